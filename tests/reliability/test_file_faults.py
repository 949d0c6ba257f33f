"""Killed at any file operation of a save, or refused by the system there: what was saved before is there, and a run goes on.

The demo at its smallest, saved after each of its four steps. Its files are written by the real writer, safetensors' own code
included; the shim of tests/harness/faultfs.py meets it below libc.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from progscale.checkpoint.manifest import read_manifest
from progscale.checkpoint.reader import open_checkpoint, verify
from tests.harness import faultfs
from tests.harness.faultfs import Operation, file_faults
from tests.harness.forks import Ended
from tests.harness.programs import REPOSITORY, config_file, in_process, records, settings, summary_of
from tests.harness.save_driver import FaultyForks

pytestmark = pytest.mark.skipif(not faultfs.SUPPORTED, reason="the shim knows x86-64 Linux alone")

STEPS = 4
TINY: dict[str, Any] = {
    "task__max_train_examples": 16,
    "task__max_eval_examples": 8,
    "train__global_batch_size": 8,
    "train__epochs": 2,
    "train__evaluate": "end",
    "train__save_model": "none",
    "schedule__stages": 2,
    "checkpoint__every_steps": 1,
    "run__threads": 1,
    "model__overrides": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "hidden_dropout_prob": 0.1,
    },
}


@dataclass(frozen=True)
class Kind:
    """A way to run the demo.

    Attributes:
        changes: of its settings.
        options: of the command line.
        ranks: how many processes.
        lost: steps that a run which is killed may lose.
    """

    changes: dict[str, Any]
    options: Sequence[str] = ()
    ranks: int = 1
    lost: int = 1

    def command(self, output: Path, *options: str, **changes: Any) -> list[str]:
        values = {**TINY, **self.changes, "run__output_dir": str(output), **changes}
        return ["train", *settings(**values), *self.options, *options]


KINDS = {
    "plain": Kind({}),
    # Written while the next step is made, and published after it.
    "background": Kind({"checkpoint__background": True}, lost=2),
    # Exported before the saves of steps 2 and 4; with these values the second model is the better one.
    "export": Kind(
        {
            "train__evaluate": "epoch",
            "train__save_model": "best",
            "task__max_eval_examples": 63,
            "optimizer__lr": 0.1,
            "run__seed": 4,
        }
    ),
    "two ranks": Kind({}, config_file("zero2"), ranks=2),
}

# In the third save, the first that deletes an old checkpoint: kind of the operation, and its path.
PLACES = {
    "the folder made": ("mkdir", r"checkpoints/\.tmp-00000003-\w+$"),
    "a shard written": ("write", r"\.tmp-00000003-\w+/\.tmp\w+$"),
    "a shard under its name": ("rename", r"\.tmp-00000003-\w+/rank00000-00000\.safetensors$"),
    "the state written": ("write", r"\.tmp-00000003-\w+/state\.json$"),
    "the manifest synced": ("fsync", r"\.tmp-00000003-\w+/manifest\.json$"),
    "published": ("rename", r"checkpoints/step-00000003$"),
    "the old one gone": ("rename", r"checkpoints/\.tmp-step-00000001$"),
    "the old one deleted": ("rmdir", r"checkpoints/\.tmp-step-00000001$"),
}


def place_of(operations: Sequence[Operation], kind: str, pattern: str) -> int:
    """Number of the first operation of a kind on a path."""
    return next(one.k for one in operations if one.kind == kind and re.search(pattern, one.path))


def third_save(operations: Sequence[Operation]) -> range:
    """From the folder to the last of the pruned checkpoint; also what is under way beside it."""
    return range(place_of(operations, *PLACES["the folder made"]), place_of(operations, *PLACES["the old one deleted"]) + 1)


class Runs:
    """Uninterrupted runs, and processes that fork runs which meet faults; each made when it is first asked for."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.cache = cache
        self._forks: dict[str, FaultyForks] = {}
        self._operations: dict[tuple[str, int], list[Operation]] = {}
        self._number = 0

    def forks(self, fault: str) -> FaultyForks:
        if fault not in self._forks:
            self._forks[fault] = FaultyForks(self.root, fault, self.cache)
        return self._forks[fault]

    def whole(self, kind: str, rank: int = 0) -> Path:
        """Output folder of a run that nothing met."""
        output = self.root / f"whole {kind} {rank}"
        if (kind, rank) not in self._operations:
            forks, chosen = self.forks("kill"), KINDS[kind]
            self._operations[kind, rank] = forks.operations(chosen.command(output), of=rank, ranks=chosen.ranks)
        return output

    def operations(self, kind: str, rank: int = 0) -> list[Operation]:
        """What that run did to files."""
        self.whole(kind, rank)
        return self._operations[kind, rank]

    def new(self) -> Path:
        """An output folder."""
        self._number += 1
        return self.root / f"{self._number}"

    def run(self, kind: str, fault: str, output: Path, /, *options: str, **where: Any) -> list[Ended]:
        chosen = KINDS[kind]
        return self.forks(fault).run(chosen.command(output, *options, **where.pop("changes", {})), ranks=chosen.ranks, **where)

    def killed_in_third_save(self) -> Path:
        """A run with the checkpoints of steps 1 and 2, and half of a third."""
        output, at = self.new(), place_of(self.operations("plain"), *PLACES["published"])
        (ended,) = self.run("plain", "kill", output, at=at)
        assert ended.code == -9, ended.err
        return output

    def close(self) -> None:
        for forks in self._forks.values():
            forks.close()


@pytest.fixture(scope="module")
def runs(cache: Path) -> Iterator[Runs]:
    # In memory where there is room for it: what a disk takes its time over is not what is tested.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="progscale-", dir=shared if shared.is_dir() else None) as folder:
        made = Runs(Path(folder), cache)
        yield made
        made.close()


def names_in(output: Path) -> set[str]:
    return {path.name for path in (output / "a" / "checkpoints").iterdir()}


def steps_saved(output: Path) -> list[int]:
    """Steps of the checkpoints, each of which is verified."""
    found = []
    for path in sorted((output / "a" / "checkpoints").glob("step-*")):
        checkpoint = open_checkpoint(path)
        verify(checkpoint)
        found.append(checkpoint.step)
    return found


def outcome(output: Path) -> dict[str, Any]:
    """All that must not depend on what a run met: losses, scores, and the bits of weights and moments at the end."""
    last = read_manifest(output / "a" / "checkpoints" / f"step-{STEPS:08d}")
    model = output / "a" / "model" / "model.safetensors"
    return {
        "losses": [(record["step"], record["loss"]) for record in records(output / "a", "step")],
        "metrics": summary_of(output / "a")["metrics"],
        "best": summary_of(output / "a")["best_metrics"],
        "state": {name: info.sha256 for name, info in last.files.items() if name != "state.json"},
        "model": model.read_bytes() if model.exists() else None,
    }


def goes_on(runs: Runs, kind: str, output: Path, whole: Path) -> None:
    """Resumed with nothing tidied up, the run loses what came after the last save and ends as if nothing had happened."""
    seen = last_step(output)
    if KINDS[kind].ranks == 1:
        answer = in_process(*KINDS[kind].command(output, "--resume", "auto"))
        assert answer.code == 0, answer.err
    else:
        for ended in runs.run(kind, "kill", output, "--resume", "auto"):
            assert ended.code == 0, ended.err
    resumed = records(output / "a", "resume")[-1]
    assert resumed["rejected"] == []
    assert seen - resumed["step"] <= KINDS[kind].lost, "more steps were lost than may be"
    assert outcome(output) == outcome(whole)
    assert not [*(output / "a").glob("model.*"), *(output / "a").glob("*.partial")]
    # Killed between the last save and what it deletes, a run has no later one that would delete it.
    late = {"step-00000002", ".latest.json"} if resumed["step"] == STEPS else set()
    assert names_in(output) - late == {"latest.json", "step-00000003", "step-00000004"}
    shutil.rmtree(output)


def last_step(output: Path) -> int:
    """The last step in the records, of which the last line may be torn."""
    lines = (output / "a" / "metrics.jsonl").read_text().split("\n")[:-1]
    return max(record["step"] for record in map(json.loads, lines) if record["kind"] == "step")


def killed_and_resumed(runs: Runs, kind: str, at: int, fault: str = "kill", rank: int = 0) -> None:
    output, ranks = runs.new(), KINDS[kind].ranks
    ended = runs.run(kind, fault, output, at=at, rank=rank)
    assert ended[rank].code == -9, f"operation {at} of rank {rank}: {ended[rank].err}"
    assert ranks == 1 or ended[1 - rank].seconds < 60
    goes_on(runs, kind, output, runs.whole(kind))


def each(numbers: Sequence[int], check: Callable[[int], None], operations: Sequence[Operation]) -> None:
    """Checks all, and names those that failed."""
    assert numbers
    print(f"{len(numbers)} of {len(operations)} file operations")
    failures = []
    for number in numbers:
        try:
            check(number)
        except Exception as error:  # an AssertionError, or what the run raised in this process
            one = operations[number - 1]
            failures.append(f"{number} ({one.kind} {one.path}): {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} of {len(numbers)}\n" + "\n".join(failures)


# -- killed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a shard written", "the state written", "published", "the old one deleted"])
def test_killed_in_a_save(runs: Runs, place: str) -> None:
    killed_and_resumed(runs, "plain", place_of(runs.operations("plain"), *PLACES[place]))


@pytest.mark.slow
def test_a_process_of_its_own_killed_in_a_save(runs: Runs) -> None:
    """As the cases above, without the process that forks."""
    at = place_of(runs.operations("plain"), *PLACES["a shard under its name"])
    output = runs.new()
    environment = os.environ | file_faults().environment(runs.root, fault=f"kill@{at}") | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "progscale", *KINDS["plain"].command(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    assert steps_saved(output) == [1, 2]
    goes_on(runs, "plain", output, runs.whole("plain"))


@pytest.mark.slow
def test_killed_at_every_operation(runs: Runs) -> None:
    """From the end of the first save to the end of the run."""
    operations = runs.operations("plain")
    first = place_of(operations, "rename", r"checkpoints/step-00000001$") + 1
    each(range(first, len(operations) + 1), lambda at: killed_and_resumed(runs, "plain", at), operations)


@pytest.mark.slow
def test_every_write_torn(runs: Runs) -> None:
    """Half of it is in the file when the process is killed."""
    operations = runs.operations("plain")
    first = place_of(operations, "rename", r"checkpoints/step-00000001$") + 1
    writes = [one.k for one in operations[first:] if one.kind == "write" and one.bytes]
    each(writes, lambda at: killed_and_resumed(runs, "plain", at, "tear"), operations)


@pytest.mark.slow
def test_killed_at_every_operation_of_a_background_save(runs: Runs) -> None:
    operations = runs.operations("background")
    each(third_save(operations), lambda at: killed_and_resumed(runs, "background", at), operations)


@pytest.mark.slow
def test_killed_at_every_operation_of_an_export(runs: Runs) -> None:
    """Of the first model, and of the second, which takes its place."""
    operations = runs.operations("export")
    assert summary_of(runs.whole("export") / "a")["best_step"] == STEPS
    first = place_of(operations, "rename", r"checkpoints/step-00000001$") + 1
    exports = [one.k for one in operations[first:] if re.search(r"/a/model(\.partial|\.old)?(/|$)", one.path)]
    each(exports, lambda at: killed_and_resumed(runs, "export", at), operations)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_a_save(runs: Runs, rank: int) -> None:
    """Of two under ZeRO-2; the other one ends too. Rank 1 writes a shard and no more, rank 0 all the rest."""
    operations = runs.operations("two ranks", rank)
    all_of_them = [one.k for one in operations if ".tmp-00000003-" in one.path] if rank else third_save(operations)[::4]
    each(all_of_them, lambda at: killed_and_resumed(runs, "two ranks", at, rank=rank), operations)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a shard under its name", "published", "the old one gone"])
def test_a_rename_that_takes_its_time(runs: Runs, place: str) -> None:
    """As over a network; nothing goes by times, and nothing is waited for in vain."""
    output = runs.new()
    (ended,) = runs.run("plain", "sleep:3", output, at=place_of(runs.operations("plain"), *PLACES[place]))
    assert ended.code == 0, ended.err
    assert ended.seconds > 3
    assert outcome(output) == outcome(runs.whole("plain"))
    assert names_in(output) == names_in(runs.whole("plain"))


# -- saved again at the same step ---------------------------------------------------------------------------------------

# Told to stop while it evaluates, a run is saved with the evaluation still to be done. Told again in the same place, it
# saves the same step again.
AGAIN = {"train__evaluate": "epoch"}


def stopped_in_evaluation(runs: Runs, **changes: Any) -> Path:
    output = runs.new()
    (ended,) = runs.run("plain", "kill", output, fault="term@evaluation=1", changes={**AGAIN, **changes})
    assert ended.code == 75, ended.err
    return output


@pytest.fixture(scope="module")
def whole_again(runs: Runs) -> Path:
    """The run with an evaluation after step 2, uninterrupted."""
    output = runs.new()
    (ended,) = runs.run("plain", "kill", output, changes=AGAIN)
    assert ended.code == 0, ended.err
    return output


def resaved(runs: Runs, base: Path, **where: Any) -> tuple[Path, Ended]:
    """A copy of a run, resumed, and told to stop where it was told before."""
    output = runs.new()
    shutil.copytree(base, output)
    options = {"fault": "term@evaluation=1", "changes": AGAIN, **where}
    (ended,) = runs.run("plain", "kill", output, "--resume", "auto", **options)
    return output, ended


def operations_of_resaving(runs: Runs, base: Path) -> list[Operation]:
    output = runs.new()
    shutil.copytree(base, output)
    command = KINDS["plain"].command(output, "--resume", "auto", **AGAIN)
    operations = runs.forks("kill").operations(command, fault="term@evaluation=1")
    assert any(one.kind == "rename" and one.path.endswith("/.old-step-00000002") for one in operations)
    shutil.rmtree(output)
    return operations


def goes_on_again(output: Path, whole: Path, at_least: int) -> None:
    answer = in_process(*KINDS["plain"].command(output, "--resume", "auto", **AGAIN))
    assert answer.code == 0, answer.err
    assert not output.joinpath("a.1").exists(), "it began anew"
    assert records(output / "a", "resume")[-1]["step"] >= at_least
    assert outcome(output) == outcome(whole)
    left = names_in(output) - {"rejected-step-00000002"}
    assert left == {"latest.json", "step-00000003", "step-00000004"}
    shutil.rmtree(output)


def test_saved_again_at_the_same_step(runs: Runs, whole_again: Path) -> None:
    base = stopped_in_evaluation(runs)
    output, ended = resaved(runs, base)
    assert ended.code == 75, ended.err
    assert steps_saved(output) == [1, 2]
    goes_on_again(output, whole_again, 2)


@pytest.mark.slow
def test_killed_at_every_operation_of_saving_again(runs: Runs, whole_again: Path) -> None:
    """Also while it goes on from the checkpoint; a step is lost at most."""
    base = stopped_in_evaluation(runs)
    operations = operations_of_resaving(runs, base)

    def check(at: int) -> None:
        output, ended = resaved(runs, base, at=at)
        assert ended.code == -9, ended.err
        goes_on_again(output, whole_again, 1)

    each(range(1, len(operations) + 1), check, operations)


def test_the_only_checkpoint_while_it_is_replaced(runs: Runs) -> None:
    """Killed between the two renames: there is no other checkpoint to fall back to."""
    base = stopped_in_evaluation(runs, checkpoint__every_steps=None)
    operations = operations_of_resaving(runs, base)
    at = place_of(operations, "rename", r"checkpoints/step-00000002$")
    output, ended = resaved(runs, base, at=at, changes={**AGAIN, "checkpoint__every_steps": None})
    assert ended.code == -9, ended.err
    command = KINDS["plain"].command(output, "--resume", "must", **AGAIN, checkpoint__every_steps=None)
    answer = in_process(*command)
    assert answer.code == 0, answer.err


# -- refused ------------------------------------------------------------------------------------------------------------

ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES")
REFUSED = ("the folder made", "a shard written", "the state written", "published")
MESSAGE = r"a checkpoint could not be written to \S+/checkpoints: .*It needs (\d+) bytes, (\d+) are free there; the checkpoints"


def name_of(error: str) -> str:
    """What the system calls it: "No space left on device"."""
    return os.strerror(getattr(errno, error))


def refused(text: str, name: str, output: Path) -> None:
    """The message that a person gets."""
    found = re.search(MESSAGE, text)
    assert found is not None, text
    assert "Traceback" not in text
    assert name in found[0]
    needed, free = map(int, found.groups())
    size = sum(path.stat().st_size for path in (output / "a" / "checkpoints" / "step-00000002").glob("rank*"))
    assert 0.5 * size < needed < 1.5 * size, "frozen blocks have no moments, else it is as much as the one before"
    assert free > 0


def told_and_trained_on(ended: Ended, output: Path, name: str, times: int) -> None:
    """The run came to its end, and said each time that it could not save."""
    assert ended.code == 0, ended.err
    assert ended.out.count("warning: a checkpoint could not be written") == times
    failed = records(output / "a", "checkpoint_failed")
    assert len(failed) == times
    for record in failed:
        refused(record["message"], name, output)
    assert [record["step"] for record in records(output / "a", "step")] == [1, 2, 3, 4]


def stops(runs: Runs, name: str, place: str) -> None:
    """From one operation on nothing can be written: the run ends, and all is as before the save."""
    output = runs.new()
    (ended,) = runs.run("plain", f"errno:{name}+", output, at=place_of(runs.operations("plain"), *PLACES[place]))
    assert ended.code == 1, ended.err
    refused(ended.err, name_of(name), output)
    assert steps_saved(output) == [1, 2]
    if name in ("ENOSPC", "EDQUOT"):  # where nothing can be deleted either, the next run does it
        assert names_in(output) == {"latest.json", "step-00000001", "step-00000002"}
    goes_on(runs, "plain", output, runs.whole("plain"))


def trains_on(runs: Runs, name: str, place: str) -> None:
    """One operation is refused, and the run has been told that it may go on without the checkpoint."""
    output, at = runs.new(), place_of(runs.operations("plain"), *PLACES[place])
    (ended,) = runs.run("plain", f"errno:{name}", output, at=at, changes={"checkpoint__on_error": "warn"})
    told_and_trained_on(ended, output, name_of(name), 1)
    assert outcome(output) == outcome(runs.whole("plain"))
    assert steps_saved(output) == [2, 4]
    assert names_in(output) == {"latest.json", "step-00000002", "step-00000004"}
    shutil.rmtree(output)


@pytest.mark.slow
@pytest.mark.parametrize("place", REFUSED)
@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_written_ends_the_run(runs: Runs, name: str, place: str) -> None:
    stops(runs, name, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", REFUSED)
@pytest.mark.parametrize("name", ERRORS)
def test_or_it_trains_on(runs: Runs, name: str, place: str) -> None:
    trains_on(runs, name, place)


@pytest.mark.parametrize("kind", ["plain", pytest.param("background", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_files_that_may_not_be_so_large(runs: Runs, policy: str, kind: str) -> None:
    """RLIMIT_FSIZE, which small files do not reach: from here on no shard can be written at all."""
    output = runs.killed_in_third_save()
    changes = {"checkpoint__on_error": policy}
    (ended,) = runs.run(kind, "kill", output, "--resume", "auto", largest_file=30_000, changes=changes)
    if policy == "stop":
        assert ended.code == 1
        refused(ended.err, name_of("EFBIG"), output)
    else:
        told_and_trained_on(ended, output, name_of("EFBIG"), 2)
    assert steps_saved(output) == [1, 2]
    assert names_in(output) == {"latest.json", "step-00000001", "step-00000002"}
    losses = [(record["step"], record["loss"]) for record in records(output / "a", "step")]
    made = STEPS if policy == "warn" else 3 if kind == "plain" else 4  # in the background a step more is made meanwhile
    assert losses == outcome(runs.whole("plain"))["losses"][:made]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_cannot_write(runs: Runs, rank: int) -> None:
    """They all hear of it and end alike, and nothing is left of what the others wrote."""
    output, at = runs.new(), place_of(runs.operations("two ranks", rank), *PLACES["a shard written"])
    ended = runs.run("two ranks", "errno:EDQUOT", output, at=at, rank=rank)
    assert [one.code for one in ended] == [1, 1], ended
    refused(ended[0].err, f"rank {rank}: [Errno {errno.EDQUOT}] {name_of('EDQUOT')}", output)
    assert ended[1].err == ""
    assert steps_saved(output) == [1, 2]
    assert names_in(output) == {"latest.json", "step-00000001", "step-00000002"}
    goes_on(runs, "two ranks", output, runs.whole("two ranks"))


@pytest.mark.slow
def test_checkpoints_on_a_full_disk_of_their_own(runs: Runs) -> None:
    """The run's own records lie elsewhere: told to, it trains to the end without any checkpoint."""
    output = runs.killed_in_third_save()
    elsewhere = runs.root.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.move(output / "a" / "checkpoints", elsewhere / "checkpoints")
    for left in (elsewhere / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(left)  # the shim's disk lets nothing be deleted by the operation that finds it full
    (output / "a" / "checkpoints").symlink_to(elsewhere / "checkpoints")
    with FaultyForks(elsewhere, "errno:ENOSPC+", runs.cache) as forks:
        command = KINDS["plain"].command(output, "--resume", "auto", checkpoint__on_error="warn")
        (ended,) = forks.run(command, at=1)
    told_and_trained_on(ended, output, name_of("ENOSPC"), 2)
    assert steps_saved(output) == [1, 2]
    assert names_in(output) == {"latest.json", "step-00000001", "step-00000002"}


@pytest.mark.slow
def test_a_full_disk_that_the_records_share(runs: Runs) -> None:
    """Told to train on without checkpoints, a run does so; that its records cannot be written either is said in a line."""
    output, at = runs.new(), place_of(runs.operations("plain"), *PLACES["a shard written"])
    (ended,) = runs.run("plain", "errno:ENOSPC+", output, at=at, changes={"checkpoint__on_error": "warn"})
    assert "Traceback" not in ended.err
    assert ended.code == 1
    assert f"step {STEPS}/{STEPS}" in ended.out
    assert re.search(r"metrics\.jsonl cannot be written \(No space left on device\): records are kept until it can", ended.err)
    assert "the run is done, but its summary.json cannot be written" in ended.err
