"""Hosts without SLURM: the same command on each, as docs/multi-node.md has it, on networks of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.evidence import evidence
from tests.harness.forks import REPOSITORY
from tests.harness.hosts import Hosts, why_not
from tests.harness.interrupted import Runs, same, twelve

LAUNCH = ["bash", str(REPOSITORY / "launch" / "launch.sh")]
PROGRAM = str(REPOSITORY / "launch" / "train.py")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two of them."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(2) as made:
        yield made


class Started:
    """The same command on all hosts, each with its own rank; as a context, at whose end nothing of it is left."""

    def __init__(self, hosts: Hosts, folder: Path, cache: Path, command: Sequence[Sequence[str]]) -> None:
        self.logs = [folder / f"host-{index}.log" for index in range(len(hosts.names))]
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PROGSCALE_CACHE": str(cache),
        }
        with ExitStack() as stack:
            self.processes = []
            for index, words in enumerate(command):
                process = hosts.start(index, words, folder=folder, log=self.logs[index], environment=environment)
                stack.callback(end, process)
                self.processes.append(process)
            self._stack = stack.pop_all()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def wait(self, seconds: float = 180.0) -> tuple[list[int], str]:
        """Exit codes by host, and what all have written."""
        codes = [process.wait(seconds) for process in self.processes]
        return codes, "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a command with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def by_hand(hosts: Hosts, *arguments: str, backend: str = "c10d") -> list[list[str]]:
    """The command of each host."""
    file = str(REPOSITORY / "configs" / "accelerate" / "multi-node-cpu.yaml")
    head = ["--config_file", file, "--main_process_ip", hosts.addresses[0], "--rdzv_backend", backend]
    return [[*LAUNCH, *head, "--machine_rank", str(index), *arguments] for index in range(len(hosts.names))]


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_two_hosts_compute_what_one_does(hosts: Hosts, runs: Runs, cache: Path, tmp_path: Path, engine: str) -> None:
    """No host can look up the name of another, and gloo meets them on the network that leads to the head."""
    with Started(hosts, tmp_path, cache, by_hand(hosts, PROGRAM, *twelve(tmp_path, engine))) as started:
        codes, out = started.wait()
    assert codes == [0, 0], out
    same(evidence(tmp_path / "a"), runs.whole(engine))
