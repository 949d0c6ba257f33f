"""The plug-in that puts faults into a run: what it reads, and that every point is reached where it says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import inject
from tests.harness.inject import Fault, parse
from tests.harness.programs import REPOSITORY, Answer, in_process, records, settings

Install = Callable[..., list[Fault]]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@step=0", Fault("kill", "step", 0)),
        ("kill@step=7,rank=*", Fault("kill", "step", 7)),
        ("termparent@evaluation=2,rank=1", Fault("termparent", "evaluation", 2, rank=1)),
        ("exit:75@midstep=3", Fault("exit", "midstep", 3, code=75)),
        ("sleep@save=1,seconds=2.5,rank=0", Fault("sleep", "save", 1, rank=0, seconds=2.5)),
        ("nan@step=4", Fault("nan", "step", 4)),
    ],
)
def test_one_fault(text: str, fault: Fault) -> None:
    assert parse(text) == [fault]


def test_several_faults_and_none() -> None:
    assert parse("usr1@switch=2; stop@loader=5,rank=1") == [Fault("usr1", "switch", 2), Fault("stop", "loader", 5, rank=1)]
    assert parse("") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kill", "not ACTION@POINT=N"),
        ("kill@step", "not ACTION@POINT=N"),
        ("kill@step=-1", "not ACTION@POINT=N"),
        ("kill@step=1,rank", "not ACTION@POINT=N"),
        ("maim@step=1", r"no action 'maim' \(kill, stop, "),
        ("kill@stage=1", r"no point 'stage' \(step, midstep, "),
        ("kill@save=0", "save counts from 1"),
        ("nan@midstep=1", "nan goes with step alone"),
        ("exit@step=1", "exit has a code"),
        ("exit:256@step=1", "exit has a code"),
        ("kill:3@step=1", "exit has a code"),
        ("kill@step=1,host=a", "no option host"),
        ("sleep@step=1", "sleep needs seconds"),
        ("kill@step=1,seconds=2", "sleep needs seconds"),
        ("sleep@step=1,seconds=soon", "could not convert string to float: 'soon'"),
        ("kill@step=1,rank=all", "invalid literal for int"),
    ],
)
def test_faults_that_cannot_be_read(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"PROGSCALE_FAULT: '{text.replace('*', '.')}': {why}"):
        parse(f"kill@step=0;{text}")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs faults in this process; the action `note` puts itself on the list that comes back."""

    def install(text: str, **options: Any) -> list[Fault]:
        fired: list[Fault] = []
        monkeypatch.setitem(inject.ACTIONS, "note", fired.append)
        inject.install(parse(text), **options)
        return fired

    yield install
    inject.uninstall()


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The small demo in this process, its data tokenised anew."""
    import progscale.loop  # patching on import has its own test, and could not be undone here

    assert progscale.loop
    monkeypatch.setenv("PROGSCALE_CACHE", str(tmp_path / "cache"))
    return lambda **changes: in_process("train", *settings(run__output_dir=str(tmp_path), **changes))


def test_the_points_of_a_run(installed: Install, demo: Callable[..., Answer], tmp_path: Path) -> None:
    """Six steps in three stages; what a point counts is checked by where the other points come."""
    texts = [
        *("note@tokenize=1", "note@switch=1", "note@loader=1", "note@step=0", "note@midstep=0", "note@step=1"),
        *("note@switch=2", "note@loader=3", "note@step=2", "note@switch=3", "note@loader=6", "note@step=5", "note@midstep=5"),
        *("note@evaluation=1", "note@evaluation=2"),
    ]
    never = ["note@step=6", "note@switch=4", "note@loader=7", "note@step=2,rank=1"]
    fired = installed(";".join([*reversed(texts), *never]))
    assert demo(train__eval_batch_size=32).code == 0
    assert fired == parse(";".join(texts))
    assert inject.STATE.waiting == parse(";".join(reversed(never)))[::-1]


def test_a_loss_that_is_nan(installed: Install, demo: Callable[..., Answer], tmp_path: Path) -> None:
    installed("nan@step=2;nan@step=4,rank=1")
    assert demo(train__nonfinite="skip:1").code == 0
    assert [(record["step"], record["fault"]) for record in records(tmp_path / "a", "nonfinite")] == [(2, "loss")]


def test_an_error_inside_a_step(installed: Install, demo: Callable[..., Answer]) -> None:
    installed("raise@midstep=1")
    with pytest.raises(RuntimeError, match="injected"):
        demo()


def test_collectives(installed: Install, tmp_path: Path) -> None:
    """Each once, though some are made of others."""
    import torch
    import torch.distributed as dist

    fired = installed(";".join(f"note@collective={number}" for number in range(1, 9)))
    ours = not dist.is_initialized()  # a run of another test may have left a group of one
    if ours:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        before = len(fired)
        dist.all_gather_object([None], "thing")
        dist.all_reduce(torch.ones(1))
        dist.broadcast_object_list(["thing"])
        dist.barrier()
        assert len(fired) - before == 4
    finally:
        if ours:
            dist.destroy_process_group()


def test_shard_files(installed: Install, tmp_path: Path) -> None:
    import torch

    shards = pytest.importorskip("progscale.checkpoint.shards")
    fired = installed("note@save=2", slow_save_seconds=0.2)
    started = time.monotonic()
    for index in range(2):
        assert fired == []
        shards.write_shard(tmp_path / f"{index}", {"weight/0/a": torch.zeros(2)}, {})
    assert fired == [Fault("note", "save", 2)]
    assert time.monotonic() - started >= 0.4


def test_a_name_that_somebody_imported(installed: Install) -> None:
    """Patched there as well, and put back."""
    import progscale.tasks.cache
    import progscale.tasks.sentence

    original = progscale.tasks.cache.batches_with_progress
    installed("note@tokenize=1")
    patched = progscale.tasks.cache.batches_with_progress
    assert patched is not original
    assert vars(progscale.tasks.sentence)["batches_with_progress"] is patched
    inject.uninstall()
    assert progscale.tasks.cache.batches_with_progress is original
    assert vars(progscale.tasks.sentence)["batches_with_progress"] is original
    assert not any(isinstance(finder, inject.PatchOnImport) for finder in sys.meta_path)


def alone(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own, with the repository on its path, and as if no launcher had started it."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("ACCELERATE")}
    added = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**inherited, **added}, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("fault", "code"),
    [("kill@save=1", -9), ("term@save=1", -15), ("usr1@save=1", -10), ("exit:75@save=1", 75), ("sleep@save=1,seconds=0.1", 0)],
)
def test_how_a_process_ends(fault: str, code: int) -> None:
    done = alone(
        "from tests.harness import inject; inject.STATE.reach('save'); inject.STATE.reach('save')", PROGSCALE_FAULT=fault
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("injected on rank 0: Fault(action=") == 1


def test_the_parent_and_oneself() -> None:
    """The parent is told by its child; one that stops is seen to have stopped."""
    program = """
import os, signal, subprocess, sys
told = []
signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
child = "from tests.harness import inject; inject.STATE.reach('switch')"
subprocess.run([sys.executable, "-c", child], env=os.environ | {"PROGSCALE_FAULT": "usr1parent@switch=1"}, check=True)
process = subprocess.Popen([sys.executable, "-c", child], env=os.environ | {"PROGSCALE_FAULT": "stop@switch=1"})
stopped = os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
process.kill()
print(len(told), stopped)
"""
    done = alone(program)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_a_run_that_is_killed(tmp_path: Path) -> None:
    """The plug-in by its name, before torch is there: everything is patched on import, also what others take by name."""
    program = f"""
import sys
from progscale.cli import main
from tests.harness import inject
assert "torch" not in sys.modules
def note(fault):
    import torch.distributed, progscale.tasks.sentence
    print([hasattr(f, "__wrapped__") for f in (torch.distributed.all_reduce, progscale.tasks.sentence.batches_with_progress)])
    sys.stdout.flush()
inject.ACTIONS["usr1"] = note
main(["train", "--plugin", "tests.harness.inject", *{settings(run__output_dir=str(tmp_path))!r}])
"""
    done = alone(program, PROGSCALE_FAULT="usr1@tokenize=1;kill@step=3", PROGSCALE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == -9, done.stderr
    assert "[True, True]" in done.stdout
    assert [record["step"] for record in records(tmp_path / "a", "step")] == [1, 2, 3]
