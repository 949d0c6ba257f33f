"""Hosts without SLURM: the same command on each, as docs/multi-node.md has it, on networks of their own."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[Hosts]:
    """Three: the fewest of which one can be told from the others."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(3) as made:
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


def by_hand(hosts: Hosts, *arguments: str) -> list[list[str]]:
    """The command of each host."""
    file, count = str(REPOSITORY / "configs" / "accelerate" / "multi-node-cpu.yaml"), str(len(hosts.names))
    head = ["--config_file", file, "--main_process_ip", hosts.addresses[0], "--rdzv_backend", "c10d"]
    head += ["--num_machines", count, "--num_processes", count]
    return [[*LAUNCH, *head, "--machine_rank", str(index), *arguments] for index in range(len(hosts.names))]


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_two_hosts_compute_what_one_does(hosts: Hosts, runs: Runs, cache: Path, tmp_path: Path, engine: str) -> None:
    """No host can look up the name of another, and gloo meets them on the network that leads to the head."""
    with Started(hosts, tmp_path, cache, by_hand(hosts, PROGRAM, *twelve(tmp_path, engine))) as started:
        codes, out = started.wait()
    assert codes == [0, 0], out
    same(evidence(tmp_path / "a"), runs.whole(engine))


def test_a_head_whose_name_is_its_loopback_tells_its_address(hosts: Hosts, tmp_path: Path) -> None:
    """As Debian writes it into /etc/hosts. The other hosts know better."""
    (tmp_path / "accelerate").write_text('#!/bin/sh\necho "$PET_LOCAL_ADDR $*"\n')
    (tmp_path / "accelerate").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for index, name in enumerate(hosts.names):
        folder = Path("/etc/netns", name)
        folder.mkdir(parents=True)
        try:
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{'10.77.0.1' if index else '127.0.1.1'} head\n")
            log, command = tmp_path / f"{index}.log", [*LAUNCH, "--main_process_ip", "head", "program"]
            if index == 0:
                # The way to everywhere is taken where no other host is known, and these have none.
                assert hosts.start(index, command, folder=tmp_path, log=log, environment=path).wait(30) == 2
                assert "'head' cannot be looked up or reached from host-0, or is its loopback" in log.read_text()
            peer = {} if index else {"PROGSCALE_PEER_ADDRESS": "10.77.0.2"}
            assert hosts.start(index, command, folder=tmp_path, log=log, environment={**path, **peer}).wait(30) == 0
            told = f"10.77.0.{index + 1} launch --rdzv_conf is_host={1 - index} --main_process_ip head program"
            assert log.read_text().strip() == told
        finally:
            shutil.rmtree(folder)


def doctors(hosts: Hosts, *arguments: str) -> list[list[str]]:
    """The doctor's command on each host."""
    return by_hand(hosts, "-m", "progscale", "doctor", "--format", "json", *arguments)


def checks_of(log: Path) -> dict[str, dict[str, str]]:
    """The doctor's answer in a log, by the name of the check."""
    text = log.read_text()
    # The launcher's own lines stand before it, and may stand behind it.
    answer, _ = json.JSONDecoder().raw_decode(text, text.index("[\n"))
    return {check["name"]: check for check in answer}


def test_the_doctor_measures_and_names_a_slow_host(three_hosts: Hosts, cache: Path, tmp_path: Path) -> None:
    """Each host has an answer of its own; what was measured is kept for a plan."""
    commands = doctors(three_hosts, "--set", "train.global_batch_size=33", "--save", "net.json")
    with three_hosts.slow(1, "80mbit"), Started(three_hosts, tmp_path, cache, commands) as started:
        codes, out = started.wait()
    assert codes == [0, 0, 0], out
    for index, log in enumerate(started.logs):
        checks = checks_of(log)
        assert f"eth7 (10.77.0.{index + 1}" in checks["network: interface"]["found"], out
        assert checks["network: host name"]["status"] == "note", "nobody can look it up, and nobody needs to"
        assert "3 nodes of 1: all-reduce" in checks["network: measured"]["found"]
        # That one computes slowly may be so too, on cores that others use.
        slow = [check["found"] for name, check in checks.items() if name.startswith("network: slow")]
        assert [line.partition(" exch")[0] for line in slow if "exchange" in line] == ["host-1"], out
    network = json.loads((tmp_path / "net.json").read_text())
    assert network["nodes"] == ["host-0", "host-1", "host-2"]
    speeds = {(one, other): speed for one, other, speed in network["links"]}
    # 80 Mbit/s are 10 MB/s, and what the shaper lets through at once.
    assert 5e6 < speeds[0, 1] < 20e6 and 5e6 < speeds[1, 2] < 20e6 < speeds[0, 2]


def test_a_host_that_others_cannot_reach_is_named(three_hosts: Hosts, cache: Path, tmp_path: Path) -> None:
    """Both reach the head, where all have met; packets between them are lost without a word."""
    commands = by_hand(three_hosts, PROGRAM, *twelve(tmp_path, "ddp", train__global_batch_size=33))
    with three_hosts.cut(2, 1), Started(three_hosts, tmp_path, cache, commands) as started:
        codes, out = started.wait(120)
    assert all(codes)
    found = "no connection between host-2 (10.77.0.3) and host-1 (10.77.0.2): a firewall, or another network"
    for log in started.logs:
        assert found in log.read_text(), out
    assert not (tmp_path / "a").exists()


def test_a_rank_that_does_not_come_is_named(hosts: Hosts, cache: Path, tmp_path: Path) -> None:
    """Its launcher is there, and what it started hangs, as a file system may."""
    commands = by_hand(hosts, PROGRAM, *twelve(tmp_path, "ddp", engine__timeout_seconds=8))
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(600)\n")
    commands[1] = [str(sleeper) if word == PROGRAM else word for word in by_hand(hosts, PROGRAM)[1]]
    with Started(hosts, tmp_path, cache, commands) as started:
        code = started.processes[0].wait(120)
        out = started.logs[0].read_text()
    # Ranks are numbered by torchrun, in the order of addresses.
    assert code and "progscale: rank 1 did not come within 8 s (engine.timeout_seconds)" in out, out
