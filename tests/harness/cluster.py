"""A real SLURM cluster of two nodes on this machine: its daemons, jobs, and nodes that die and come back.

Needs root, and slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge). Both nodes are this machine: they share
its address, its file system and its process numbers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.forks import LAUNCHER, REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm" / "train.sbatch"
NODES = ("n1", "n2")
# With short time-outs: a node that is gone is seen soon, and a job that is queued again may begin soon.
CONF = """\
ClusterName=progscale-tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={ctld}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
KillWait=30
SlurmdTimeout=10
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1 MaxTime=10 State=UP
"""


def why_not() -> str:
    """Why no cluster can be started here; empty where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if find(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs of its users, and must be root"


def find(name: str) -> str | None:
    """A program, also one of the system's that is on no user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The cluster, as a context: at its end nothing of it is left.

    Args:
        folder: of its state; a short path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        ctld, n1, n2 = free_ports(3)
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ctld=ctld, n1=n1, n2=n2))
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        start_munge()
        self._daemon("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes("idle")
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.ask("scancel", "--user=root")
        for node in NODES:
            self.kill_node(node)
        pid = self.folder / "slurmctld.pid"
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGKILL)

    def _daemon(self, name: str, *options: str) -> None:
        program = find(name)
        assert program is not None
        with (self.folder / f"{name}.start").open("ab") as out:
            subprocess.run([program, *options], env=self.environment, check=True, stdout=out, stderr=out, timeout=60)

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout.strip()

    # -- nodes ----------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Starts the node's daemon."""
        self._daemon("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Ends the node's daemon and all that it has started, as if its power went."""
        pids = [process for process in processes() if self._is_of(process, node)]
        for process in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _is_of(self, process: int, node: str) -> bool:
        with contextlib.suppress(OSError):
            entry = Path(f"/proc/{process}")
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() not in environment:
                return False
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(command[0])).name == "slurmd":
                return node.encode() in command
            # What a job runs there knows its node; the keepers of steps have been forked off slurmd, whose command line is lost.
            return f"SLURMD_NODENAME={node}".encode() in environment or self._keeps_step(entry, node)
        return False

    def _keeps_step(self, entry: Path, node: str) -> bool:
        """Whether a process is the node's slurmstepd, which has its own folder open."""
        if b"slurmstepd" not in (entry / "cmdline").read_bytes():
            return False
        links = []
        for link in (entry / "fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(link))
        return any(f"slurmd-{node}.log" in link or f"spool-{node}" in link for link in links)

    def wait_for_nodes(self, state: str, seconds: float = 60.0) -> None:
        """Waits until all nodes are in a state, as sinfo names it."""
        until = time.monotonic() + seconds
        while (found := self.ask("sinfo", "-h", "-N", "-p", "debug", "-o", "%T")).split() != [state] * len(NODES):
            assert time.monotonic() < until, f"the nodes are {found}, and not {state}"
            time.sleep(0.5)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        folder: Path,
        options: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        script: Path = SCRIPT,
    ) -> str:
        """Submits the script from a folder; returns the job's number."""
        inherited = {key: value for key, value in self.environment.items() if not key.startswith(LAUNCHER)}
        inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        ended = subprocess.run(
            command, cwd=folder, env={**inherited, **(environment or {})}, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip().partition(";")[0]

    def show(self, job: str, key: str) -> str:
        """One value of a job, as scontrol names it."""
        found = re.search(rf"\b{key}=(\S*)", self.ask("scontrol", "show", "job", "-o", job))
        assert found is not None
        return found.group(1)

    def wait(self, job: str, states: Sequence[str], seconds: float = 240.0) -> str:
        """Waits until the job is in one of the states; returns it."""
        until = time.monotonic() + seconds
        while (state := self.show(job, "JobState")) not in states:
            assert time.monotonic() < until, f"job {job} is {state} ({self.show(job, 'Reason')}), and not {' or '.join(states)}"
            time.sleep(0.5)
        return state


def processes() -> list[int]:
    """All process numbers."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing uses."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def start_munge() -> None:
    """By which SLURM's daemons know each other; one for the machine."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    program = find("munged")
    assert program is not None
    command = ["start-stop-daemon", "--start", "--oknodo", "--chuid", "munge", "--exec", program]
    subprocess.run([*command, "--", "--pid-file", "/run/munge/munged.pid"], check=True, capture_output=True, timeout=60)
    until = time.monotonic() + 20
    while subprocess.run(["munge", "-n"], capture_output=True).returncode != 0:
        assert time.monotonic() < until, "munged does not answer"
        time.sleep(0.2)
