"""Faults of a run, put into it from outside: `progscale train --plugin tests.harness.inject …` with PROGSCALE_FAULT set.

    PROGSCALE_FAULT="kill@step=7,rank=1"                    one fault, or several joined by ";"
    PROGSCALE_FAULT="term@evaluation=2;sleep@save=1,seconds=5,rank=*"
    PROGSCALE_SLOW_SAVE=5                                   each shard file takes five seconds more

A fault is ACTION@POINT=N with `,rank=R` (default *: every rank) and `,seconds=S` (of sleep). ACTIONS and POINTS list what
there is. Each fires once in a process, and says so on stderr. A loader's worker is a process of its own, started anew for
each epoch, and the rank is its parent.

Modules are patched as soon as they are imported: a plug-in comes before torch, and the product decides when that is loaded.
Collectives that C++ starts are not seen (DDP's gradient buckets, DeepSpeed's shared-memory operations).
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Function = Callable[..., Any]

# Where a fault can be, and the number of the first: 0 for the step's own number, 1 for what the process counts.
POINTS = {
    "step": 0,  # just before optimizer step N
    "midstep": 0,  # in step N, after its first forward pass
    "collective": 1,  # before the N-th collective of torch.distributed
    "evaluation": 1,  # before the N-th evaluation batch
    "tokenize": 1,  # before the N-th batch of rows is tokenised
    "save": 1,  # before the N-th shard file is written
    "loader": 1,  # before the N-th global batch is made
    "switch": 1,  # before the N-th Engine.begin_stage
}
COLLECTIVES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "_all_gather_base"),
    *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "monitored_barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "scatter", "scatter_object_list"),
    *("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"),
)
FAULT = re.compile(r"(?P<action>[a-z0-9]+)(:(?P<code>\d+))?@(?P<point>[a-z]+)=(?P<at>\d+)(?P<options>(,[a-z]+=[^,=]+)*)")


@dataclass(frozen=True)
class Fault:
    """What happens where.

    Attributes:
        action: a key of ACTIONS.
        point: a key of POINTS.
        at: which of the points.
        rank: the one that is met; None for every rank.
        seconds: of sleep.
        code: of exit.
    """

    action: str
    point: str
    at: int
    rank: int | None = None
    seconds: float = 0.0
    code: int = 0


def send(number: signal.Signals, *, parent: bool = False) -> Callable[[Fault], None]:
    """The action that sends a signal to this process, or to the one that started it."""
    return lambda fault: os.kill(os.getppid() if parent else os.getpid(), number)


def raise_error(fault: Fault) -> None:
    raise RuntimeError("injected")


ACTIONS: dict[str, Callable[[Fault], None]] = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "term": send(signal.SIGTERM),
    "usr1": send(signal.SIGUSR1),
    "int": send(signal.SIGINT),
    "termparent": send(signal.SIGTERM, parent=True),
    "usr1parent": send(signal.SIGUSR1, parent=True),
    "raise": raise_error,
    "exit": lambda fault: os._exit(fault.code),
    "sleep": lambda fault: time.sleep(fault.seconds),
    "nan": lambda fault: STATE.poison(),
}


def parse(text: str) -> list[Fault]:
    """The faults of PROGSCALE_FAULT.

    Raises:
        ValueError: naming the fault that cannot be read, and why.
    """
    return [parse_one(part.strip()) for part in text.split(";")] if text else []


def parse_one(text: str) -> Fault:
    def refuse(why: str) -> ValueError:
        return ValueError(f"PROGSCALE_FAULT: {text!r}: {why}")

    found = FAULT.fullmatch(text)
    if found is None:
        raise refuse("not ACTION@POINT=N[,rank=R|*][,seconds=S]")
    action, point, at = found["action"], found["point"], int(found["at"])
    options = dict(word.split("=") for word in found["options"].split(",")[1:])
    if action not in ACTIONS:
        raise refuse(f"no action {action!r} ({', '.join(ACTIONS)})")
    if point not in POINTS:
        raise refuse(f"no point {point!r} ({', '.join(POINTS)})")
    if at < POINTS[point]:
        raise refuse(f"{point} counts from {POINTS[point]}")
    if action == "nan" and point != "step":
        raise refuse("nan goes with step alone")
    if (action == "exit") != (found["code"] is not None) or int(found["code"] or 0) > 255:
        raise refuse("exit has a code of 0 to 255 (exit:3), and nothing else has one")
    if unknown := options.keys() - {"rank", "seconds"}:
        raise refuse(f"no option {', '.join(unknown)} (rank, seconds)")
    if (action == "sleep") != ("seconds" in options):
        raise refuse("sleep needs seconds, and nothing else has them")
    try:
        seconds = float(options.get("seconds", "0"))
        rank = None if options.get("rank", "*") == "*" else int(options["rank"])
    except ValueError as error:
        raise refuse(str(error)) from error
    return Fault(action, point, at, rank, seconds, int(found["code"] or 0))


class State:
    """What is still to come, and how far the process is.

    Attributes:
        waiting: faults that have not fired.
        step: the optimizer step that runs.
        poisoned: whether the next loss becomes NaN.
        inside: whether this thread is in a collective: some are made of others.
    """

    def __init__(self, faults: Sequence[Fault] = (), slow_save_seconds: float = 0.0) -> None:
        self.waiting = list(faults)
        self.slow_save_seconds = slow_save_seconds
        self.step = -1
        self.poisoned = False
        self.inside = threading.local()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, point: str, at: int | None = None) -> None:
        """Fires what waits at a point.

        Args:
            point: a key of POINTS.
            at: its number; None counts.
        """
        rank = int(os.environ.get("RANK", "0"))
        # A background save writes shards while the main thread goes on.
        with self._lock:
            self._counts[point] += 1
            number = self._counts[point] if at is None else at
            due = [f for f in self.waiting if f.point == point and f.at == number and f.rank in (None, rank)]
            self.waiting = [fault for fault in self.waiting if fault not in due]
        for fault in due:
            os.write(2, f"injected on rank {rank}: {fault}\n".encode())
            ACTIONS[fault.action](fault)

    def poison(self) -> None:
        """Makes the next loss NaN."""
        self.poisoned = True


STATE: State = State()


# -- the points: each makes a function's replacement from the function ----------------------------------------------


def counted(point: str) -> Callable[[Function], Function]:
    """A point before each call."""

    def replace(original: Function) -> Function:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            STATE.reach(point)
            return original(*args, **kwargs)

        return call

    return replace


def at_step(original: Function) -> Function:
    """progscale.loop.seed_step is the first that a step does."""

    @functools.wraps(original)
    def seed_step(seed: int, step: int, rank: int) -> Any:
        STATE.step = step
        STATE.reach("step", step)
        return original(seed, step, rank)

    return seed_step


def in_step(original: Function) -> Function:
    """Engine.train_step, its loss function wrapped."""

    @functools.wraps(original)
    def train_step(engine: Any, micro_batches: Any, rows: int, loss_function: Function, *args: Any, **kwargs: Any) -> Any:
        def loss_of(*inputs: Any) -> Any:
            STATE.reach("midstep", STATE.step)
            loss = loss_function(*inputs)
            if STATE.poisoned:
                STATE.poisoned = False
                loss = loss * float("nan")
            return loss

        return original(engine, micro_batches, rows, loss_of, *args, **kwargs)

    return train_step


def at_collective(original: Function) -> Function:
    """A collective that another one calls does not count."""

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        if getattr(STATE.inside, "collective", False):
            return original(*args, **kwargs)
        STATE.reach("collective")
        STATE.inside.collective = True
        try:
            return original(*args, **kwargs)
        finally:
            STATE.inside.collective = False

    return collective


def at_evaluation_batch(original: Function) -> Function:
    """Session.evaluation_batches."""

    @functools.wraps(original)
    def evaluation_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in original(*args, **kwargs):
            STATE.reach("evaluation")
            yield batch

    return evaluation_batches


def at_tokenizing(original: Function) -> Function:
    """batches_with_progress: before each batch of rows."""

    @functools.wraps(original)
    def batches_with_progress(*args: Any, **kwargs: Any) -> Iterator[tuple[int, int]]:
        for batch in original(*args, **kwargs):
            STATE.reach("tokenize")
            yield batch

    return batches_with_progress


def at_shard(original: Function) -> Function:
    """write_shard, slower where PROGSCALE_SLOW_SAVE says so."""

    @functools.wraps(original)
    def write_shard(*args: Any, **kwargs: Any) -> Any:
        STATE.reach("save")
        time.sleep(STATE.slow_save_seconds)
        return original(*args, **kwargs)

    return write_shard


# -- putting them in place ------------------------------------------------------------------------------------------

# Module → (attribute, what makes its replacement).
PATCHES: dict[str, list[tuple[str, Callable[[Function], Function]]]] = {
    "torch.distributed.distributed_c10d": [(name, at_collective) for name in COLLECTIVES],
    "progscale.loop": [("seed_step", at_step)],
    "progscale.engine.base": [("Engine.train_step", in_step), ("Engine.begin_stage", counted("switch"))],
    "progscale.session": [("Session.evaluation_batches", at_evaluation_batch)],
    "progscale.tasks.cache": [("batches_with_progress", at_tokenizing)],
    "progscale.data": [("TrainLoader.build", counted("loader"))],
    "progscale.checkpoint.shards": [("write_shard", at_shard)],
}
_undo: list[tuple[Any, str, Function, Function]] = []


def patch(module: ModuleType) -> None:
    """Replaces what PATCHES lists of a module."""
    for path, make in PATCHES[module.__name__]:
        holder, _, name = path.rpartition(".")
        owner = getattr(module, holder) if holder else module
        original = getattr(owner, name, None)
        if original is None and name.startswith("_"):
            continue  # other releases of torch
        assert original is not None, f"{module.__name__}.{path} is gone: tests/harness/inject.py needs its new name"
        replacement = make(original)
        swap(owner, name, original, replacement)
        _undo.append((owner, name, original, replacement))


def swap(owner: Any, name: str, old: Function, new: Function) -> None:
    """Puts `new` where `old` is, also where another module has imported it by name."""
    setattr(owner, name, new)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


class PatchOnImport(MetaPathFinder):
    """Patches a module right after it ran, before anybody else can take something out of it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in PATCHES:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                patch(module)

            vars(spec.loader)["exec_module"] = execute_and_patch
        return spec


def install(faults: Sequence[Fault], slow_save_seconds: float = 0.0) -> None:
    """Makes the faults wait; modules that are there already are patched at once."""
    global STATE
    STATE = State(faults, slow_save_seconds)
    sys.meta_path.insert(0, PatchOnImport())
    for name in PATCHES:
        if name in sys.modules:
            patch(sys.modules[name])


def uninstall() -> None:
    """Leaves everything as it was, for a test process that goes on."""
    global STATE
    STATE = State()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, PatchOnImport)]
    while _undo:
        owner, name, original, replacement = _undo.pop()
        swap(owner, name, replacement, original)


if "PROGSCALE_FAULT" in os.environ or "PROGSCALE_SLOW_SAVE" in os.environ:
    install(parse(os.environ.get("PROGSCALE_FAULT", "")), float(os.environ.get("PROGSCALE_SLOW_SAVE", "0")))
