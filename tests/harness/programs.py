"""Whole runs: the command line in this process, and the launcher with one and with two."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progscale.cli import main
from progscale.config import load_config
from progscale.errors import ConfigError, NetworkError
from progscale.trackers import RunFolder
from tests.harness.cases import reset_accelerate

REPOSITORY = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = ["--config_file", str(REPOSITORY / "configs" / "accelerate" / "cpu2.yaml")]
# One epoch of six steps in three stages, on the demo.
SMALL = {
    "task.max_train_examples": 192,
    "task.max_eval_examples": 51,
    "train.epochs": 1,
    "schedule.stages": 3,
    "train.logging_steps": 1,
    "run.name": "a",
}


@dataclass
class Answer:
    """What a command gave back."""

    code: int
    err: str
    out: str = ""


def settings(**changes: Any) -> list[str]:
    """`--set` for the small demo with some values changed; `train__epochs` stands for train.epochs."""
    values = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in values.items() if value is not ... for word in ("--set", f"{key}={json.dumps(value)}")]


def in_process(*arguments: str) -> Answer:
    """`progscale …` in this process, as if no launcher had started it."""
    reset_accelerate()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, err.getvalue(), out.getvalue())


def launched(folder: Path, arguments: Sequence[str], *, launcher: Sequence[str] = ()) -> Answer:
    """`accelerate launch … launch/train.py …` in `folder`, on a machine where no launcher ran before."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("ACCELERATE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [*LAUNCH, *launcher, str(REPOSITORY / "launch" / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Answer(done.returncode, done.stderr, done.stdout)


def start_process_group() -> None:
    """As a run does it; a group that is up stays."""
    from progscale.engine.launch import make_accelerator

    reset_accelerate()
    make_accelerator(deepspeed=None)


def same_config_on_all_ranks(seeds: Sequence[int]) -> str:
    """What a rank says when rank r was started with the r-th of these seeds; runs in each rank."""
    from progscale.joining import check_same_on_all_ranks

    start_process_group()
    try:
        check_same_on_all_ranks(load_config([], [f"run.seed={seeds[int(os.environ['RANK'])]}"]))
    except ConfigError as error:
        return str(error)
    return ""


def same_input_on_all_ranks(data: Sequence[str]) -> str:
    """What a rank says when rank r has read the r-th of these; runs in each rank."""
    from progscale.joining import check_same_input
    from progscale.resume import DATA, EPOCH, MODEL

    start_process_group()
    try:
        check_same_input({DATA: data[int(os.environ["RANK"])], EPOCH: 3, MODEL: "2 tensors"})
    except ConfigError as error:
        return str(error)
    return ""


def measured_here() -> dict[str, Any]:
    """What a rank measures with the others of this machine; runs in each rank."""
    import torch

    from progscale.preflight import measure

    start_process_group()
    return measure(torch.device("cpu"), int(os.environ["LOCAL_WORLD_SIZE"]), os.environ).to_json()


def measured_with_a_rank_that_hangs() -> str:
    """What every rank is told when one does not come out of a call; runs in each rank."""
    import time

    import torch

    from progscale import preflight

    def hang(found: dict[str, Any], *args: Any) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(60)
        found.update(flops=1.0, within=1.0, all=1.0, latency=1.0)

    start_process_group()
    look = preflight._look
    vars(preflight)["_look"] = hang
    try:
        preflight.measure(torch.device("cpu"), 2, os.environ, seconds=0.3)
    except NetworkError as error:
        return str(error)
    finally:
        vars(preflight)["_look"] = look
    return ""


def folder_on_all_ranks(path: str) -> str:
    """What a rank says when the main process claims a run folder; runs in each rank."""
    from progscale.engine.ranks import on_main

    start_process_group()
    try:
        folder = on_main(lambda: RunFolder(Path(path), {}, "hash"))
    except ConfigError as error:
        return str(error)
    return "a folder" if folder is not None else "nothing"


def failing_main() -> str:
    """What a rank meets when the main process meets a full disk; runs in each rank."""
    from progscale.engine.ranks import on_main

    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    start_process_group()
    try:
        on_main(write)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def summary_of(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder."""
    return dict(json.loads((folder / "summary.json").read_text()))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def config_file(name: str) -> list[str]:
    """A shipped config as an option."""
    return ["--config", str(REPOSITORY / "configs" / f"{name}.json")]
