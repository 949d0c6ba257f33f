"""Runs as forks of one process that has imported everything: each costs a second instead of seven, and may be killed.

The test process holds a `Forks`; that starts this module as a program, which waits for requests and forks a process for each
rank of each. Nothing of torch runs in the program itself, so that it has no thread which a fork would lose.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# What a launcher or an earlier run leaves in the environment, and a rank must not find.
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC",
    "TORCH_ELASTIC",
    "PET_",
    "ACCELERATE",
    "PROGSCALE",
)
# Most of a run's time, where the run itself imports them.
HEAVY = (
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "evaluate", "transformers.models.bert.modeling_bert"),
    *("progscale.run", "progscale.engine.deepspeed", "progscale.tasks.metrics.glue"),
)
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: exit code; -N where signal N killed it.
        err: what it wrote on stderr.
        out: what it wrote on stdout.
        seconds: from the request to the end of the last rank.
        timed_out: whether it was killed because the time was over.
    """

    code: int
    err: str
    out: str
    seconds: float
    timed_out: bool


class Forks:
    """The test process's side.

    Args:
        cache: folder of tokenised data; the runs share it.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        arguments: Sequence[str],
        *,
        ranks: int = 1,
        fault: str = "",
        kill_line: tuple[str, int] | None = None,
        slow_save_seconds: float = 0.0,
        environment: Mapping[str, str] | None = None,
        seconds: float = 120.0,
    ) -> list[Ended]:
        """`progscale …` in `ranks` processes, to its end.

        Args:
            arguments: of the command.
            ranks: several find each other as under a launcher that keeps no store.
            fault: as PROGSCALE_FAULT.
            kill_line: ("module:function", N): SIGKILL before the N-th line that runs in the function.
            slow_save_seconds: as PROGSCALE_SLOW_SAVE.
            environment: variables more.
            seconds: after which the ranks are killed.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="progscale-forks-") as folder:
            request = {
                "arguments": list(arguments),
                "ranks": ranks,
                "fault": fault,
                "kill_line": kill_line,
                "slow_save_seconds": slow_save_seconds,
                "environment": {"PROGSCALE_CACHE": str(self._cache), **(environment or {})},
                "seconds": seconds,
                "folder": folder,
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            assert line, "the program that forks has ended; see its stderr above"
            answer = json.loads(line)
            return [
                Ended(
                    code,
                    (Path(folder) / f"{rank}.err").read_text(errors="replace"),
                    (Path(folder) / f"{rank}.out").read_text(errors="replace"),
                    answer["seconds"],
                    answer["timed_out"],
                )
                for rank, code in enumerate(answer["codes"])
            ]

    def _start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        # OMP_NUM_THREADS is what accelerate's launcher sets: a fork and a launched rank compute the same bits.
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "tests.harness.forks"]
        self._process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        """Ends the program."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(60)
            self._process = None


# -- the program --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers requests until the test process goes away."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import importlib

    for name in HEAVY:
        with contextlib.suppress(ModuleNotFoundError):  # other releases of DeepSpeed
            importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line), answers.fileno())) + "\n")
        answers.flush()
    os._exit(0)  # nothing to tidy up, and DeepSpeed takes seconds over it


def answer(request: dict[str, Any], private: int) -> dict[str, Any]:
    """Forks the ranks, waits for them, and says how they ended."""
    started = time.monotonic()
    port = free_port()
    processes: list[int] = []
    for rank in range(request["ranks"]):
        process = os.fork()
        if process == 0:
            os.close(private)
            be_rank(rank, port, request)
        # Also here: the group must be there before anybody kills it.
        with contextlib.suppress(OSError):
            os.setpgid(process, process)
        processes.append(process)
    codes: dict[int, int] = {}
    timed_out = False
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(ended[1])
        if not timed_out and time.monotonic() - started > request["seconds"]:
            timed_out = True
            for process in processes:
                kill_group(process)
        time.sleep(POLL_SECONDS)
    # A rank's data loaders outlive it for seconds.
    for process in processes:
        kill_group(process)
    return {"codes": [codes[process] for process in processes], "seconds": time.monotonic() - started, "timed_out": timed_out}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_group(leader: int) -> None:
    """Kills the processes of a rank."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def be_rank(rank: int, port: int, request: dict[str, Any]) -> None:
    """Becomes a rank; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(request["folder"]) / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        world_size = request["ranks"]
        if world_size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= request["environment"]
        from progscale.cli import main
        from tests.harness import inject

        inject.install(inject.parse(request["fault"]), request["slow_save_seconds"])
        if request["kill_line"] is not None:
            kill_at_line(*request["kill_line"])
        code = main(request["arguments"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_at_line(function: str, count: int) -> None:
    """SIGKILL before the `count`-th line (from 1) that runs in "module:function"; says how many ran where there are fewer."""
    import importlib

    module, _, name = function.partition(":")
    owner: Any = importlib.import_module(module)
    for part in name.split("."):
        owner = getattr(owner, part)
    code: CodeType = owner.__code__
    seen = 0

    def in_function(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == count:
                os.write(2, f"killed at line {frame.f_lineno} of {function}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
        return in_function

    sys.settrace(lambda frame, event, argument: in_function if frame.f_code is code else None)


if __name__ == "__main__":
    serve()
