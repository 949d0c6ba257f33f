"""What the doctor says of the network: names, ports, interfaces, the settings of NCCL and gloo, and what was measured."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from progscale.checks import Check, Status, size, told
from progscale.launcher import Ranks, interface_towards, try_port

if TYPE_CHECKING:
    from progscale.preflight import Network

SIGNALS = "export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TIMEOUT = "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"
# What slows every step when it was left on after a search for a mistake: value, and why.
SLOWS = {
    "NCCL_P2P_DISABLE": ("1", "GPUs of a node talk through the CPU's memory"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a node talk over the network"),
    "NCCL_IB_DISABLE": ("1", "InfiniBand is not used"),
    "CUDA_LAUNCH_BLOCKING": ("1", "the CPU waits for every kernel"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked beforehand"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the CPU waits for every collective"),
    "NCCL_DEBUG": ("TRACE", "every call is written down"),
}


class Interface(NamedTuple):
    """A network interface of this machine.

    Attributes:
        name: "eth0".
        addresses: IPv4, as numbers.
        megabits: per second as its driver says; 0 where it does not.
    """

    name: str
    addresses: tuple[str, ...]
    megabits: int = 0


def interfaces() -> list[Interface]:
    """Those of this machine that are up."""
    import psutil

    stats, found = psutil.net_if_stats(), []
    for name, entries in psutil.net_if_addrs().items():
        if name in stats and stats[name].isup:
            addresses = tuple(entry.address for entry in entries if entry.family == socket.AF_INET)
            found.append(Interface(name, addresses, stats[name].speed))
    return found


def infiniband() -> list[str]:
    """Devices that can do RDMA."""
    folder = Path("/sys/class/infiniband")
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def interface_checks(environment: Mapping[str, str], ranks: Ranks, there: Sequence[Interface], *, on_gpu: bool) -> list[Check]:
    """Whether the interfaces that gloo and NCCL were told of are there, and which one is taken where they were not."""
    checks, names = [], [interface.name for interface in there]
    for key, matches in (("GLOO_SOCKET_IFNAME", gloo_takes), ("NCCL_SOCKET_IFNAME", nccl_takes)):
        if key in environment:
            taken = [interface for interface in there if matches(environment[key], interface.name)]
            status: Status = "ok" if taken else "problem"
            found = f"'{environment[key]}' is {', '.join(map(describe, taken)) or 'no interface that is up'}"
            checks.append(Check(f"network: {key}", status, found, "" if taken else f"unset it, or one of {', '.join(names)}"))
    if ranks.machines_are_several and not on_gpu and "GLOO_SOCKET_IFNAME" not in environment:
        host = environment.get("MASTER_ADDR", "")

        def chosen() -> str:
            name = interface_towards(host)
            return next((describe(interface) for interface in there if interface.name == name), "gloo's own choice")

        remedy = "correct MASTER_ADDR, or set GLOO_SOCKET_IFNAME"
        checks.append(told("network: interface", "on the way to the head: {}", chosen, remedy=remedy))
    return checks


def describe(interface: Interface) -> str:
    """An interface in words."""
    speed = f", {interface.megabits / 1000:g} Gbit/s" if interface.megabits else ""
    return f"{interface.name} ({', '.join(interface.addresses) or 'no IPv4 address'}{speed})"


def gloo_takes(value: str, name: str) -> bool:
    """Gloo takes names, separated by commas."""
    return name in value.split(",")


def nccl_takes(value: str, name: str) -> bool:
    """NCCL takes beginnings of names; `=` before them asks for whole names, `^` for all but those."""
    excluded, rest = value.startswith("^"), value.lstrip("^")
    exact, rest = rest.startswith("="), rest.lstrip("=")
    among = [part for part in rest.split(",") if part]
    fits = name in among if exact else any(name.startswith(part) for part in among)
    return fits != excluded


def setting_checks(
    environment: Mapping[str, str], ranks: Ranks, devices: Sequence[str], *, on_gpu: bool, locked: int, shared_memory: int
) -> list[Check]:
    """Settings that slow a run down or keep NCCL from working.

    Args:
        environment: of this process.
        ranks: of the run.
        devices: that can do RDMA.
        on_gpu: ranks talk by NCCL.
        locked: RLIMIT_MEMLOCK in bytes, negative for none.
        shared_memory: bytes of /dev/shm.
    """
    checks = []
    for key, (value, why) in SLOWS.items():
        if environment.get(key, "").upper() == value and (key != "NCCL_IB_DISABLE" or devices):
            checks.append(Check(f"network: {key}", "note", f"{value}: {why}", f"unset {key}"))
    if environment.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        found = "0: a collective that fails leaves its rank waiting"
        checks.append(Check("network: TORCH_NCCL_ASYNC_ERROR_HANDLING", "note", found, "unset it"))
    if not on_gpu:
        return checks
    if ranks.machines_are_several:
        found = ", ".join(devices) or "none: NCCL goes over sockets"
        checks.append(
            Check("network: RDMA", "ok" if devices else "note", found, "" if devices else "nothing, where there is none")
        )
    if devices and 0 <= locked < 2**30:
        remedy = "ulimit -l unlimited (SLURM: PropagateResourceLimitsExcept=MEMLOCK)"
        checks.append(Check("network: locked memory", "problem", f"limited to {size(locked)}; RDMA registers more", remedy))
    if ranks.local > 1 and 0 < shared_memory < 2**28:
        found = f"/dev/shm has {size(shared_memory)}; NCCL's ranks of a node meet there"
        checks.append(Check("network: shared memory", "problem", found, "docker run --shm-size=1g, or --ipc=host"))
    return checks


def measured_checks(network: Network, share: float) -> list[Check]:
    """What was measured, with a note on what is slow."""
    slow = network.slow(share)
    checks = [Check("network: measured", "ok", str(network))]
    return checks + [Check(f"network: slow {index + 1}", "note", line, "see that node") for index, line in enumerate(slow)]


def network_checks(environment: Mapping[str, str], ranks: Ranks) -> list[Check]:
    """Whether the names resolve, and rank 0 can have the port; torchrun's own store holds it already."""
    own, host = socket.gethostname(), environment.get("MASTER_ADDR", "127.0.0.1")
    port = environment.get("MASTER_PORT", "")

    def address(name: str) -> str:
        return str(socket.getaddrinfo(name, None)[0][4][0])

    def bind() -> str:
        if port:
            try_port(int(port))
        else:
            try_port(0, "127.0.0.1")
        return "free"

    # Nothing needs this machine's own name: launch.sh and gloo are told addresses.
    checks = [told("network: host name", f"{own} is {{}}", address, own, remedy="put it into /etc/hosts", status="note")]
    checks.append(told("network: main address", f"{host} is {{}}", address, host, remedy="correct MASTER_ADDR"))
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        checks.append(Check("network: port", "ok", f"{port}, held by the launcher"))
    elif not ranks.rank:
        checks.append(told("network: port", f"{port or 'some port'} is {{}}", bind, remedy="another MASTER_PORT"))
    return checks


def signal_check(environment: Mapping[str, str], ranks: Ranks) -> Check:
    """Whether the launcher hands SIGUSR1 on and gives a save time; torchrun tells its ranks which signals it handles."""
    handled = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", environment.get("PET_SIGNALS_TO_HANDLE", ""))
    waits = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT"} & set(environment)
    lines = [] if "SIGUSR1" in handled.replace(" ", "").split(",") else [("SIGUSR1 kills the launcher", SIGNALS)]
    lines += [] if waits else [("a save is cut off after 30 s", TIMEOUT)]
    if "TORCHELASTIC_RUN_ID" not in environment or ranks.world_size == 1:
        return Check("signals", "note", "no launcher of several ranks", f"launch/launch.sh sets these:\n{SIGNALS}\n{TIMEOUT}")
    if not lines:
        return Check("signals", "ok", "the launcher hands SIGUSR1 on and waits for a save")
    whys, exports = zip(*lines, strict=True)
    return Check("signals", "note", "; ".join(whys), "\n".join(["before it is started:", *exports]))
