"""What a run tells TensorBoard, MLflow, Weights & Biases or trackio, each in a thread of its own.

A service may be slow, unreachable, or fail: that costs its records, and never a step of the run. What it costs is said once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from progscale.config import Config, dump_config
from progscale.engine.tracking import Tracker, make_tracker
from progscale.errors import Fault

# What brings each of them.
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}
# Records that a service may lag behind before further ones are left out.
MOST_WAITING = 10_000
# How long the end of a run waits for a service that still has records to take.
CLOSE_SECONDS = 30.0
# The runs' names there, so that a run that is resumed goes on under its own.
FILE = "trackers.json"
# Of a record, what is no figure.
NO_FIGURES = ("kind", "time", "step", "stage", "start_step", "end_step")
PREFIXES = {"step": "train", "evaluation": "eval", "stage": "stage"}

Values = Mapping[str, Any]

log = logging.getLogger("progscale")


def tracker_faults(config: Config) -> list[Fault]:
    """Trackers whose package is not there."""
    return [
        Fault(
            "trackers.names", f"'{name}' needs the package {PACKAGES[name]}, which is not installed: pip install {PACKAGES[name]}"
        )
        for name in config.trackers.names
        if find_spec(PACKAGES[name]) is None
    ]


class Tracking:
    """All trackers of a run; on the main process alone.

    Args:
        config: of the run.
        folder: of the run.
        step: from which it goes on; 0 for a new one.
    """

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        known = read_names(folder) if step else {}
        options = flat_options(config)
        self._workers = []
        for name in config.trackers.names:
            started = start_options(name, config, folder, known.get(name), step) | config.trackers.options.get(name, {})
            # TensorBoard has files instead of projects.
            project = "tensorboard" if name == "tensorboard" else config.trackers.project
            # A run that goes on there has its options, and MLflow takes no others.
            stored = None if name in known else options
            self._workers.append(Worker(name, functools.partial(make_tracker, name, project, folder, started), stored))
        self._folder = folder
        self._names = known
        self._told: set[str] = set()

    def record(self, kind: str, values: Values) -> None:
        """Passes the figures of a record on; returns at once."""
        prefix = PREFIXES.get(kind)
        if prefix is None:
            return
        figures = {f"{prefix}/{key}": value for key, value in numbers(values) if key not in NO_FIGURES}
        if kind == "step":
            figures["train/stage"] = values["stage"]
        step = int(values["end_step"] if kind == "stage" else values["step"])
        for worker in self._workers:
            worker.put(figures, step)

    def failures(self) -> list[str]:
        """What has failed since this was asked last."""
        # A service that cannot be reached now may be there the next time: its name is kept.
        names = self._names | {worker.name: worker.run_name for worker in self._workers if worker.run_name is not None}
        if names != self._names:
            self._names = names
            try:
                (self._folder / FILE).write_text(json.dumps(names) + "\n", encoding="utf-8")
            except OSError as error:
                log.warning("%s cannot be written (%s): a resumed run will be a new one there", error.filename, error.strerror)
        found = []
        for worker in self._workers:
            if worker.fault is not None and worker.fault not in self._told:
                self._told.add(worker.fault)
                found.append(f"tracker '{worker.name}': {worker.fault}; the run goes on")
        return found

    def close(self) -> list[str]:
        """Waits a while for what is still to be taken, ends the runs there, and returns what failed."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
        return self.failures()


class Worker:
    """One tracker in its thread.

    Attributes:
        name: of the tracker.
        run_name: what the service calls the run, once it has begun.
        fault: what went wrong last; None so far.
        begun: set when the service has taken up the run, or failed to.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], options: Values | None) -> None:
        self.name = name
        self.run_name: str | None = None
        self.fault: str | None = None
        self.begun = threading.Event()
        self._make = make
        self._options = options
        self._queue: queue.Queue[tuple[Values, int] | None] = queue.Queue(MOST_WAITING)
        # A service that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, figures: Values, step: int) -> None:
        """Hands figures over, or leaves them out where too many are waiting."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait((figures, step))
        except queue.Full:
            self.fault = self.fault or "it does not keep up, and records are left out"

    def end(self) -> None:
        """Nothing more will come."""
        with contextlib.suppress(queue.Full):  # then it is waited for in vain, and that is said
            self._queue.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Until it is done, at most so long."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            lost = self._queue.qsize()
            self.fault = f"it has not taken all records within {CLOSE_SECONDS:.0f} s of the run's end ({lost} are lost)"

    def _work(self) -> None:
        """Whatever the service raises ends its records alone: it is kept as the fault, which the run shows."""
        try:
            tracker = self._make()
            tracker.start()
            self.run_name = run_name_of(self.name, tracker)
            if self._options is not None:
                tracker.store_init_configuration(dict(self._options))
        except Exception as error:
            self._fail("it could not begin", error)
            return
        finally:
            self.begun.set()
        try:
            while (entry := self._queue.get()) is not None:
                figures, step = entry
                tracker.log(dict(figures), step=step)
            tracker.finish()
        except Exception as error:
            self._fail("it failed", error)

    def _fail(self, what: str, error: Exception) -> None:
        text = str(error).strip().splitlines()
        self.fault = f"{what} ({type(error).__name__}: {text[0] if text else 'no message'})"


def start_options(name: str, config: Config, folder: Path, known: str | None, step: int) -> dict[str, Any]:
    """What a service is told when the run begins, or goes on there.

    Args:
        name: of the tracker.
        config: of the run.
        folder: of the run.
        known: what the service called the run that goes on.
        step: from which it does; 0 for a new one.
    """
    if name == "tensorboard":
        # What was recorded after the checkpoint is recorded once more.
        return {"purge_step": step + 1} if step else {}
    if name == "mlflow":
        return {"run_name": config.run_name} if known is None else {"run_id": known}
    if name == "trackio":
        # A run of another folder may have the same name.
        return {"name": known or config.run_name, "resume": "never" if known is None else "allow"}
    return {"name": config.run_name, "dir": str(folder)} | ({} if known is None else {"id": known, "resume": "allow"})


def run_name_of(name: str, tracker: Tracker) -> str | None:
    """What a service calls the run, where it needs that to go on with it."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if name == "trackio":
        return str(tracker.tracker.name)
    return str(tracker.tracker.id) if name == "wandb" else None


def flat_options(config: Config) -> dict[str, str | int | float | bool]:
    """Dotted key → value of every option, as trackers take them."""
    found: dict[str, str | int | float | bool] = {}
    for section, values in dump_config(config).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            plain = isinstance(value, str | int | float | bool)
            found[f"{section}.{key}".rstrip(".")] = value if plain else json.dumps(value)
    return found


def numbers(values: Values) -> Iterator[tuple[str, float]]:
    """The finite figures of a record."""
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield key, value


def read_names(folder: Path) -> dict[str, str]:
    """What the services call the run that goes on; nothing where that is not known."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(run) for name, run in content.items()} if isinstance(content, dict) else {}
