"""The runs of a suite on this machine: one after the other, or one on each GPU."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from progscale.errors import PreemptedError, UserError
from progscale.report.quantities import seconds_text
from progscale.signals import Signals
from progscale.suite.grid import Cell, Suite

POLL_SECONDS = 0.2
# Without a terminal a line about the runs at work in so many seconds.
LINE_SECONDS = 30.0
TAIL_LINES = 12
# As launch/launch.sh has them: the launcher passes signals on, and waits for a large checkpoint.
LAUNCHER = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


@dataclass
class Worker:
    """A place where a run can be at work.

    Attributes:
        gpus: that it has, as CUDA_VISIBLE_DEVICES has them; None leaves them as they are.
        cores: that it may use; None for all.
        cell: at work.
        process: of it.
        log: what it prints.
        begun: when.
    """

    gpus: str | None
    cores: frozenset[int] | None = None
    cell: Cell | None = None
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    begun: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of the runs: those that failed, with their exit codes."""

    failed: dict[str, int]


def places(workers: int, gpus: Sequence[str], processes: int) -> list[Worker]:
    """Where runs can be at work.

    Args:
        workers: runs at a time, without GPUs.
        gpus: names of the GPUs to use; none leaves them as they are.
        processes: of a run, each of which takes a GPU.

    Raises:
        UserError: fewer GPUs than a run has processes.
    """
    if not gpus:
        return [Worker(None, cores) for cores in shares_of_cores(workers)]
    if len(gpus) < processes:
        raise UserError(f"--gpus: {len(gpus)} GPUs for runs of {processes} processes each; give one for each process")
    return [Worker(",".join(gpus[start : start + processes])) for start in range(0, len(gpus) - processes + 1, processes)]


def shares_of_cores(workers: int) -> list[frozenset[int] | None]:
    """As many cores for each, so that runs side by side do not take turns on them; None where there is no need or no way."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if workers == 1 or len(cores) < workers:
        return [None] * workers
    return [frozenset(cores[len(cores) * place // workers : len(cores) * (place + 1) // workers]) for place in range(workers)]


def command_of(cell: Cell, processes: int, extra: Sequence[str]) -> list[str]:
    """What runs a cell: the same as by hand."""
    program = ["-m", "progscale", "train", "--config", str(cell.file), "--resume", "auto", *extra]
    if processes == 1:
        return [sys.executable, *program]
    # torchrun starts ranks with and without GPUs alike; DeepSpeed and precision are the config's to say.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *program]


def run_cells(
    suite: Suite,
    cells: Sequence[Cell],
    *,
    signals: Signals,
    workers: int = 1,
    gpus: Sequence[str] = (),
    processes: int = 1,
    extra: Sequence[str] = (),
) -> Outcome:
    """Runs cells, as many at a time as there are places; one that fails does not keep the others from running.

    Args:
        suite: theirs.
        cells: to run.
        signals: listening: when told to stop, the runs are told, save, and can go on later.
        workers: runs at a time, without GPUs.
        gpus: names of the GPUs to use.
        processes: of a run.
        extra: further options of train.

    Raises:
        UserError: there are not enough GPUs.
        PreemptedError: told to stop; the runs at work have saved.
    """
    free = places(workers, gpus, processes)
    waiting, done, failed = list(cells), 0, {}
    started, said = time.monotonic(), time.monotonic()
    (suite.folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while waiting or any(worker.process for worker in free):
            for worker in free:
                if worker.process is None and waiting and signals.received is None:
                    begin(worker, waiting.pop(0), suite.folder / "logs", processes, extra)
                if worker.process is not None and (code := worker.process.poll()) is not None:
                    cell = ended(worker)
                    done += 1
                    if code != 0:
                        failed[cell.name] = code
                    show_end(suite, cell, code, time.monotonic() - worker.begun, done, len(cells), started)
            if signals.received is not None:
                tell(free, signal.SIGTERM)
                raise PreemptedError(
                    f"told to stop: {done} of {len(cells)} runs are done, those at work have saved; the same command goes on"
                )
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                show_work(free)
            time.sleep(POLL_SECONDS)
    finally:
        tell(free, signal.SIGTERM)
    return Outcome(failed)


def begin(worker: Worker, cell: Cell, logs: Path, processes: int, extra: Sequence[str]) -> None:
    """Starts a run in a process group of its own, so that a Ctrl-C at the terminal reaches it once."""
    environment = LAUNCHER | dict(os.environ)
    if worker.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = worker.gpus
    command = command_of(cell, processes, extra)
    log = (logs / f"{cell.name}.log").open("ab")
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    worker.cell, worker.log, worker.begun = cell, log, time.monotonic()
    worker.process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    if worker.cores is not None:
        # Before it has begun to count the cores, which takes it seconds of importing.
        os.sched_setaffinity(worker.process.pid, worker.cores)
    print(f"begun: {cell.name}" + (f" on GPU {worker.gpus}" if worker.gpus else ""), flush=True)


def ended(worker: Worker) -> Cell:
    """Frees a worker."""
    assert worker.cell is not None
    assert worker.log is not None
    worker.log.close()
    cell, worker.cell, worker.process = worker.cell, None, None
    return cell


def tell(workers: Sequence[Worker], number: int) -> None:
    """Passes a signal on to the runs at work, and waits until they have saved."""
    running = [worker for worker in workers if worker.process is not None]
    for worker in running:
        assert worker.process is not None
        # To its first process alone: that is the run, or torchrun, which tells the ranks.
        worker.process.send_signal(number)
    for worker in running:
        assert worker.process is not None
        worker.process.wait()
        ended(worker)


def show_end(suite: Suite, cell: Cell, code: int, seconds: float, done: int, total: int, started: float) -> None:
    """A line about a run that has ended, and how long the rest may take."""
    left = (time.monotonic() - started) / done * (total - done)
    rest = f", about {seconds_text(left)} left" if done < total else ""
    if code == 0:
        print(f"done: {cell.name} in {seconds_text(seconds)} ({done} of {total}{rest})", flush=True)
        return
    log = suite.folder / "logs" / f"{cell.name}.log"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    print(f"failed: {cell.name}, exit code {code} ({done} of {total}{rest}); the end of {log}:", file=sys.stderr)
    print("\n".join(f"    {line}" for line in tail), file=sys.stderr, flush=True)


def show_work(workers: Sequence[Worker]) -> None:
    """How far the runs at work are, from the last line about a step in their logs."""
    for worker in workers:
        if worker.cell is None or worker.log is None:
            continue
        try:
            with open(worker.log.name, "rb") as log:
                log.seek(max(0, os.path.getsize(worker.log.name) - 4000))
                steps = re.findall(r"^step \d+/\d+.*$", log.read().decode(errors="replace"), re.M)
        except OSError:
            continue
        if steps:
            print(f"  {worker.cell.name}: {steps[-1]}", flush=True)
