"""What the program that started this process says of its ranks, and whether it and the processes beside this one are there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from progscale.errors import LaunchError

# What torchrun, accelerate launch and deepspeed give every rank of several.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# An address of nobody (RFC 5737): the way there is that of the default route.
EVERYWHERE = "192.0.2.1"
REMEDY = "unset them, or start with launch/launch.sh, accelerate launch or torchrun"


class Ranks(NamedTuple):
    """Processes of the run and of this machine, and this one's rank; None where no launcher gave it one."""

    world_size: int = 1
    local: int = 1
    rank: int | None = None

    @property
    def machines_are_several(self) -> bool:
        """Whether some ranks are on other machines."""
        return self.world_size > self.local


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """The ranks that the launcher's variables tell of.

    Raises:
        LaunchError: they are incomplete, no numbers, or contradict each other.
    """
    # DeepSpeed's own launcher has another name for it.
    name = "LOCAL_SIZE" if "LOCAL_WORLD_SIZE" not in environment and "LOCAL_SIZE" in environment else "LOCAL_WORLD_SIZE"
    local_world_size = environment.get(name, "1")
    if not local_world_size.isdecimal() or int(local_world_size) == 0:
        raise LaunchError(f"{name}: '{local_world_size}' is no number of processes, from 1; {REMEDY}")
    if not {"RANK", "LOCAL_RANK"} & set(environment) and environment.get("WORLD_SIZE", "1") == "1":
        return Ranks(local=int(local_world_size))
    if missing := [key for key in VARIABLES if key not in environment]:
        raise LaunchError(f"a launcher's variables are set, but not {', '.join(missing)}; {REMEDY}")
    numbers = {key: environment[key] for key in VARIABLES if key != "MASTER_ADDR"}
    for key, value in numbers.items():
        if not value.isdecimal():
            raise LaunchError(f"{key}: '{value}' is no number; {REMEDY}")
    rank, world_size, local_rank, port = (int(value) for value in numbers.values())
    if rank >= world_size:
        raise LaunchError(f"RANK: {rank} is not below WORLD_SIZE, {world_size}; {REMEDY}")
    if local_rank >= world_size:
        raise LaunchError(f"LOCAL_RANK: {local_rank} is not below WORLD_SIZE, {world_size}; {REMEDY}")
    if int(local_world_size) > world_size:
        raise LaunchError(f"{name}: {local_world_size} is more than WORLD_SIZE, {world_size}; {REMEDY}")
    if port > 65535:
        raise LaunchError(f"MASTER_PORT: {port} is no port, which ends at 65535; {REMEDY}")
    return Ranks(world_size, int(local_world_size), rank)


def keeps_store(environment: Mapping[str, str]) -> bool:
    """Whether rank 0 has to open the port; torchrun's agent does it otherwise."""
    return environment.get("RANK") == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def try_port(port: int, host: str = "") -> None:
    """Opens a port of this machine and closes it again; 0 is any.

    Raises:
        OSError: it cannot be had.
    """
    with socket.socket() as probe:
        # As torch's store does: a port that was left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def address_towards(host: str) -> str:
    """This machine's address on the way to a host, as numbers; nothing is sent.

    On the host itself its name may stand for its loopback (Debian: 127.0.1.1), where nobody else finds it: then it is that on the
    way to another machine (`$PROGSCALE_PEER_ADDRESS`), or to everywhere.

    Raises:
        OSError: the host's name is not known, or no way leads there.
    """
    return towards_head(host)[0]


def towards_head(host: str) -> tuple[str, bool]:
    """As `address_towards`; and whether this machine is that host. launch/launch.sh asks too.

    Raises:
        OSError: as `address_towards`.
    """
    own, there = _reach(host)
    if ipaddress.ip_address(there).is_loopback and host not in (there, "localhost"):
        return _reach(os.environ.get("PROGSCALE_PEER_ADDRESS") or EVERYWHERE)[0], True
    return own, own == there


def _reach(host: str) -> tuple[str, str]:
    """This machine's address on the way to a host, and the host's."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0]), str(address[0])


def interface_towards(host: str) -> str | None:
    """The network interface on the way to a host ("eth0"); None where none has the address.

    Raises:
        OSError: as `address_towards`.
    """
    import psutil

    own = address_towards(host)
    found = psutil.net_if_addrs().items()
    return next((name for name, entries in found if any(entry.address.partition("%")[0] == own for entry in entries)), None)


def follow(number: signal.Signals = signal.SIGTERM) -> None:
    """Has the kernel send a signal when the launcher dies: it may be killed, or pass no signals on (one process).

    Started by hand there is no launcher: a shell that closes must not end a run that was meant to go on.
    """
    if not is_launched():
        return
    set_option = getattr(ctypes.CDLL(None), "prctl", None)
    if set_option is not None:  # Linux
        parent_death_signal = 1
        set_option(parent_death_signal, int(number), 0, 0, 0)


def is_launched() -> bool:
    """Whether a launcher started this process, and not a person."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def is_orphan() -> bool:
    """Whether the launcher is gone, and the system's first process stands in for it."""
    first = Path("/proc/1/cmdline")
    # In a container the launcher may itself be the first process.
    return (
        is_launched()
        and os.getppid() == 1
        and first.exists()
        and not re.search(rb"python|accelerate|torchrun", first.read_bytes())
    )


def lacks_ranks(launcher: int, environment: Mapping[str, str]) -> bool:
    """Whether a rank that a launcher started on this machine is gone: it then ends the others, as if they were told to stop.

    Args:
        launcher: process id.
        environment: of this rank.

    Returns:
        False also where that cannot be known: the launcher itself is gone, or there is no /proc.
    """
    expected = environment.get("LOCAL_WORLD_SIZE", "1")
    if not expected.isdecimal() or int(expected) < 2 or os.getppid() != launcher:
        return False
    processes = [entry for entry in Path("/proc").glob("[0-9]*") if is_rank_of(entry, launcher)]
    return 0 < len(processes) < int(expected)


def is_rank_of(entry: Path, launcher: int) -> bool:
    """Whether a folder of /proc is that of a living rank that the launcher started."""
    try:
        state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        is_child = int(parent) == launcher and state != "Z"
        return is_child and any(line.startswith(b"LOCAL_RANK=") for line in (entry / "environ").read_bytes().split(b"\0"))
    except OSError:  # it ended meanwhile
        return False


@functools.cache
def machine() -> str:
    """This machine, as far as process numbers go: two may have one name, and a container numbers of its own."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # macOS
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def process_state(process: int) -> str:
    """The state of a process as /proc shows it ("S", "T" for stopped, "Z"); "" when there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        if not Path("/proc/self/stat").exists():
            return "?"  # macOS
        return ""
