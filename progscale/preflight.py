"""Before a run on several machines: who has come, who reaches whom, and how fast.

Otherwise a node whose network is wrong shows itself as a collective in which all wait, for the process group's time-out, and
without a name. Here every step has a limit of its own, what the ranks find goes over the launcher's store, which each of them has
reached already, and whoever is missing, cut off or slow is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import json
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from progscale.engine.ranks import connect_store
from progscale.errors import NetworkError
from progscale.launcher import address_towards, read_ranks

# Of one attempt: a connection, an exchange of two nodes, an all-reduce.
LIMIT_SECONDS = 30.0
TELL_SECONDS = 30.0
POLL_SECONDS = 0.0002
# A node or connection with less than this share of the others' median is told of; ranks of one CPU are in each other's way.
SLOW_GPU, SLOW_CPU = 0.5, 0.3
REPEATS = 4
# Exchanges in a row: through a slow network, where each takes long enough, and within a node or of nearly nothing.
FEW, MANY = 4, 20
# A process may begin several runs, and what was put down for one is not for the next; all ranks count alike.
_MEETINGS = itertools.count()


@dataclass(frozen=True)
class Network:
    """What was measured.

    Attributes:
        nodes: name of each node, by the number that its ranks give it.
        ranks_per_node: as many on each.
        links: of neighbouring nodes: (one, other, bytes/s that one sends to the other, all its ranks together, while it receives
            as many).
        all_reduce_bytes_per_second: of an all-reduce over all ranks: bytes of the tensor over the time.
        within_bytes_per_second: the same over the ranks of one node, the slowest; None where it has one.
        latency_seconds: of the smallest all-reduce.
        flops_per_second: of a rank's matrix product, by node its slowest rank's.
        flops_of: the numbers that were multiplied, "bf16" or "fp32".
        bytes: of the tensor that was reduced.
    """

    nodes: tuple[str, ...]
    ranks_per_node: int
    links: tuple[tuple[int, int, float], ...]
    all_reduce_bytes_per_second: float
    within_bytes_per_second: float | None
    latency_seconds: float
    flops_per_second: tuple[float, ...]
    flops_of: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def slow(self, share: float) -> list[str]:
        """What is slower than `share` of the others, each with a name."""
        # A node is as good as its best link: its neighbours have a slow one too, to it.
        best = (
            [max(speed for *ends, speed in self.links if node in ends) for node in range(len(self.nodes))] if self.links else []
        )
        usual = statistics.median_high(best) if best else 0.0
        slow = [node for node, speed in enumerate(best) if speed < share * usual]
        found = [f"{self.nodes[node]} exchanges {_rate(best[node])} with its neighbours, others {_rate(usual)}" for node in slow]
        found += [
            f"{self.nodes[one]} and {self.nodes[other]} exchange {_rate(speed)}, others {_rate(usual)}"
            for one, other, speed in self.links
            if speed < share * usual and one not in slow and other not in slow
        ]
        usual = statistics.median_high(self.flops_per_second)
        found += [
            f"{self.nodes[node]} computes {speed / 1e9:.3g} GFLOP/s a rank, others {usual / 1e9:.3g}"
            for node, speed in enumerate(self.flops_per_second)
            if speed < share * usual
        ]
        return found

    def __str__(self) -> str:
        within = "" if self.within_bytes_per_second is None else f", within a node {_rate(self.within_bytes_per_second)}"
        links = f"{_rate(min(speed for _, _, speed in self.links))} between neighbours" if self.links else "no links"
        return (
            f"{len(self.nodes)} nodes of {self.ranks_per_node}: all-reduce {_rate(self.all_reduce_bytes_per_second)}{within}, "
            f"{links}, {self.latency_seconds * 1e6:.0f} µs at least"
        )


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.3g} MB/s"


# -- before there is a process group ----------------------------------------------------------------------------------


def meet(environment: Mapping[str, str], seconds: float, say: Callable[[str], None]) -> int:
    """Waits for all ranks, and has the first rank of each node connect to that of every other.

    Where the launcher keeps no store there is nothing to meet at before the process group; then it does nothing.

    Args:
        environment: of this rank.
        seconds: to wait for those that have not come.
        say: tells a person whom the first rank waits for.

    Returns:
        Ranks of each node, one where nodes have unequally many; 0 where nothing was done.

    Raises:
        NetworkError: on every rank that came, naming who is missing, cannot be reached, or has no GPU where others have.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return 0
    own = read_ranks(environment)
    rank, leads = own.rank or 0, environment.get("LOCAL_RANK", "0") == "0"
    store = connect_store(f"progscale/meet/{next(_MEETINGS)}", LIMIT_SECONDS)
    address = own_address(environment)
    store.set(f"here/{rank}", json.dumps([node_name(environment), address, leads, own.local, torch.cuda.device_count()]))
    if rank == 0:
        why = _wait_for_all(store, own.world_size, own.local, seconds, say)
        here = [] if why else [json.loads(store.get(f"here/{other}")) for other in range(own.world_size)]
        leaders = {other: f"{name} ({at})" for other, (name, at, first, *_) in enumerate(here) if first}
        locals_ = {local for *_, local, _ in here}
        alike = len(locals_) == 1 and own.world_size % own.local == 0
        why = why or _without_gpus([(name, gpus) for name, *_, gpus in here])
        store.set("all", json.dumps({"why": why, "leaders": leaders, "local": own.local if alike else 1}))
    answer = _answer(store, "all", seconds + LIMIT_SECONDS)
    names = {int(leader): name for leader, name in answer.get("leaders", {}).items()}
    if leads:
        failed = asyncio.run(_reach(store, rank, address, sorted(names)))
        store.set(f"reach/{rank}", json.dumps(failed))
    if rank == 0:
        store.wait([f"reach/{leader}" for leader in names], datetime.timedelta(seconds=4 * LIMIT_SECONDS))
        pairs = [(one, other) for one in names for other in json.loads(store.get(f"reach/{one}"))]
        store.set("reached", json.dumps({"why": _cut_off(pairs, names, "no connection") if pairs else ""}))
    _answer(store, "reached", 5 * LIMIT_SECONDS)
    return int(answer["local"])


def _without_gpus(here: Sequence[tuple[str, int]]) -> str:
    """Why the run cannot begin: nodes that would talk by gloo while others do by NCCL; empty when all are alike.

    Args:
        here: name of its node and number of GPUs that torch sees, by rank.
    """
    without = list(dict.fromkeys(name for name, gpus in here if not gpus))
    others = [name for name, gpus in here if gpus]
    if not without or not others:
        return ""
    return f"torch sees no GPU on {', '.join(without)}, and some on {others[0]}: see nvidia-smi and progscale doctor there"


def node_name(environment: Mapping[str, str]) -> str:
    """As SLURM calls this node, else as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def own_address(environment: Mapping[str, str]) -> str:
    """This machine's address on the network of the interface that gloo or NCCL was told of, else on the way to the head."""
    import psutil

    keys = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
    if torch.cuda.is_available():
        keys.reverse()  # NCCL it is that talks
    for key in keys:
        entries = psutil.net_if_addrs().get(environment.get(key, ""), [])
        for entry in entries:
            if entry.family == socket.AF_INET:
                return str(entry.address)
    return address_towards(environment["MASTER_ADDR"])


def _wait_for_all(store: Any, world_size: int, local: int, seconds: float, say: Callable[[str], None]) -> str:
    """Why the run cannot begin: ranks that did not come in time; empty when all are here."""
    begin = told = time.monotonic()
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        now = time.monotonic()
        names = _of_nodes(store, missing, world_size, local)
        if now - begin > seconds:
            return f"{names} did not come within {seconds:.0f} s (engine.timeout_seconds); see that node's log"
        if now - told > TELL_SECONDS:
            told = now
            say(f"waiting for {names}, {now - begin:.0f} s so far")
        time.sleep(0.1)
    return ""


def _of_nodes(store: Any, missing: Sequence[int], world_size: int, local: int) -> str:
    """Ranks in words, with the names of nodes of which another rank is here."""
    parts = []
    for first in range(0, world_size, local):
        node = range(first, min(first + local, world_size))
        absent = [rank for rank in missing if rank in node]
        if not absent:
            continue
        here = next((rank for rank in node if rank not in missing), None)
        name = f" of {json.loads(store.get(f'here/{here}'))[0]}" if here is not None else ""
        ranks = f"ranks {absent[0]} to {absent[-1]}" if len(absent) > 1 else f"rank {absent[0]}"
        parts.append(f"{ranks}{name}")
    return ", ".join(parts)


def _answer(store: Any, key: str, seconds: float) -> dict[str, Any]:
    """What the first rank puts down.

    Raises:
        NetworkError: it has put down why the run cannot begin, or nothing in time.
    """
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
    except RuntimeError as error:
        raise NetworkError(f"rank 0 did not answer within {seconds:.0f} s: it is gone, or its node is") from error
    answer: dict[str, Any] = json.loads(store.get(key))
    if answer.get("why"):
        raise NetworkError(answer["why"])
    return answer


async def _reach(store: Any, rank: int, address: str, leaders: Sequence[int]) -> list[int]:
    """First ranks of nodes that cannot be reached from here; each pair of nodes is tried from the higher rank."""

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(b"here")
            await writer.drain()
        writer.close()

    async def tries(other: int, host: str, port: int) -> bool:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), LIMIT_SECONDS / 2)
            answer = await asyncio.wait_for(reader.readexactly(4), LIMIT_SECONDS / 2)
            writer.close()
            return answer == b"here"
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return False

    server = await asyncio.start_server(welcome, address, 0)
    store.set(f"port/{rank}", json.dumps([address, server.sockets[0].getsockname()[1]]))
    below = [other for other in leaders if other < rank]
    places = [json.loads(store.get(f"port/{other}")) for other in below]
    reached = await asyncio.gather(*(tries(other, *place) for other, place in zip(below, places, strict=True)))
    store.add("tried", 1)
    until = time.monotonic() + 2 * LIMIT_SECONDS
    while store.add("tried", 0) < len(leaders) and time.monotonic() < until:
        await asyncio.sleep(0.05)  # others may still want to connect
    server.close()
    return [other for other, fine in zip(below, reached, strict=True) if not fine]


def _cut_off(failed: Sequence[tuple[int, int]], names: Mapping[int, str], what: str) -> str:
    """Failed pairs in words: first who is in most of them."""
    counts = Counter(node for pair in failed for node in pair)
    worst, most = counts.most_common(1)[0]
    if most > 1 or len(names) == 2:
        others = [names[one if other == worst else other] for one, other in failed if worst in (one, other)]
        text = f"{what} between {names[worst]} and {', '.join(others[:8])}{' …' if len(others) > 8 else ''}"
    else:
        text = "; ".join(f"{what} between {names[one]} and {names[other]}" for one, other in failed[:8])
    return f"{text}: a firewall, or another network than the one meant (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"


# -- in the process group ---------------------------------------------------------------------------------------------


class _StuckError(Exception):
    """Something has not come to its end within its limit."""


def measure(device: torch.device, local: int, environment: Mapping[str, str], seconds: float = LIMIT_SECONDS) -> Network:
    """Measures the network and the ranks' arithmetic. A collective; some seconds.

    Args:
        device: of this rank.
        local: ranks of each node, which lie one behind the other.
        environment: of this rank.
        seconds: that one exchange may take.

    Raises:
        NetworkError: on every rank, naming the nodes between which nothing came through.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = connect_store(f"progscale/measure/{next(_MEETINGS)}", LIMIT_SECONDS)
    size = 2**24 if device.type == "cuda" else 2**19
    found: dict[str, Any] = {"name": node_name(environment), "links": {}, "at": None}

    def look() -> None:
        try:
            _look(found, device, size, local, seconds)
        except (_StuckError, RuntimeError) as error:
            found["stuck"] = str(error).partition("\n")[0]
        except Exception as error:
            crashed.append(error)
        finally:
            done.set()

    # NCCL sets connections up within its calls, for which it has no limit.
    done, crashed = threading.Event(), list[Exception]()
    threading.Thread(target=look, name="preflight", daemon=True).start()
    told = {**found, "stuck": f"not done after {3 * seconds:.0f} s"} if not done.wait(3 * seconds) else found
    if crashed:
        raise crashed[0]
    store.set(f"found/{rank}", json.dumps(told))
    if rank == 0:
        store.set("report", json.dumps(_report(store, world_size, local, size, seconds)))
    # A rank may be stuck in each of its steps.
    report = _answer(store, "report", 10 * seconds)
    links = tuple((int(one), int(other), float(speed)) for one, other, speed in report.pop("links"))
    nodes, flops = tuple(report.pop("nodes")), tuple(report.pop("flops_per_second"))
    flops_of = "bf16" if device.type == "cuda" else "fp32"
    return Network(nodes=nodes, links=links, flops_per_second=flops, flops_of=flops_of, **report)


def _look(found: dict[str, Any], device: torch.device, size: int, local: int, seconds: float) -> None:
    """Fills `found` with what this rank measures; `at` is the pair of nodes that it is at.

    Raises:
        _StuckError, RuntimeError: something does not come through.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    count, node, position = world_size // local, rank // local, rank % local
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread's own
    # All ranks make the groups, also those that would have left because of a neighbour.
    inside = dist.new_subgroups(group_size=local)[0] if local > 1 else None
    found["flops"] = _flops(device)
    out, into = torch.zeros(size, device=device), torch.empty(size, device=device)
    for one, other in _neighbours(count):
        if node in (one, other):
            found["at"] = [one, other]
            peer = (other if node == one else one) * local + position
            found["links"][f"{one}-{other}"] = size * 4 / _best(partial(_exchange, peer, out, into), seconds, FEW)
    found["at"] = None
    within = None if inside is None else _best(partial(_all_reduce, out, inside), seconds, MANY)
    found["within"] = None if within is None else size * 4 / within
    found["all"] = size * 4 / _best(partial(_all_reduce, out, None), seconds, FEW)
    found["latency"] = _best(partial(_all_reduce, out[:1], None), seconds, MANY)
    if inside is not None:
        dist.destroy_process_group(inside)  # with its buffers


def _neighbours(count: int) -> list[tuple[int, int]]:
    """Pairs of a ring of nodes, in rounds in which every node is once at most."""
    ring = [(node, node + 1) for node in range(count - 1)] + ([(0, count - 1)] if count > 2 else [])
    return [pair for pair in ring if pair[0] % 2 == 0 and pair[1] == pair[0] + 1] + [
        pair for pair in ring if not (pair[0] % 2 == 0 and pair[1] == pair[0] + 1)
    ]


def _report(store: Any, world_size: int, local: int, size: int, seconds: float) -> dict[str, Any]:
    """The whole as every rank's part has it; else `why` it cannot be told."""
    found: dict[int, dict[str, Any]] = {}
    until = time.monotonic() + 8 * seconds
    while len(found) < world_size and time.monotonic() < until:
        for rank in range(world_size):
            if rank not in found and store.check([f"found/{rank}"]):
                found[rank] = json.loads(store.get(f"found/{rank}"))
        time.sleep(0.02)
    names = {rank // local: part["name"] for rank, part in found.items()}
    gone = sorted({rank // local for rank in range(world_size) if rank not in found})
    if gone:
        return {"why": f"{', '.join(names.get(node, f'node {node}') for node in gone)}: no rank answers"}
    stuck = {rank: part for rank, part in found.items() if "stuck" in part}
    if stuck:
        pairs = sorted({tuple(part["at"]) for part in stuck.values() if part["at"]})
        if pairs:
            return {"why": _cut_off(pairs, names, "nothing comes through")}
        first = min(stuck)
        where = f"rank {first} of {names[first // local]}, {stuck[first]['stuck']}"
        return {"why": f"an all-reduce of all ranks fails although neighbours reach each other: {where}"}
    links: dict[str, float] = {}
    for rank in range(0, world_size, local):
        for pair in found[rank]["links"]:
            # What the ranks of a node send together, the slower side of the two.
            together = sum(found[rank + position]["links"][pair] for position in range(local))
            links[pair] = min(together, links.get(pair, together))
    within = [part["within"] for part in found.values() if part["within"] is not None]
    return {
        "nodes": [names[node] for node in sorted(names)],
        "ranks_per_node": local,
        "links": [[*map(int, pair.split("-")), speed] for pair, speed in links.items()],
        "all_reduce_bytes_per_second": min(part["all"] for part in found.values()),
        "within_bytes_per_second": min(within) if within else None,
        "latency_seconds": max(part["latency"] for part in found.values()),
        "flops_per_second": [
            min(found[rank]["flops"] for rank in range(first, first + local)) for first in range(0, world_size, local)
        ],
        "bytes": size * 4,
    }


def _best(action: Callable[[], Iterable[Any]], seconds: float, in_a_row: int = 1) -> float:
    """Seconds of the quickest of some; the first one sets connections up.

    Args:
        action: begins it.
        seconds: that it may take.
        in_a_row: begun one after the other without a wait where NCCL does them, each of which may be quicker than a look whether
            it is done; the same on all ranks.
    """
    in_a_row = 1 if dist.get_backend() == "gloo" else in_a_row
    times = []
    for repeat in range(REPEATS):
        count = in_a_row if repeat else 1
        begin = time.perf_counter()
        for work in [work for _ in range(count) for work in action()]:
            _complete(work, seconds)
        times.append((time.perf_counter() - begin) / count)
    return min(times[1:])


def _complete(work: Any, seconds: float) -> None:
    """Waits for a piece of communication, no longer than so many seconds.

    Raises:
        _StuckError: it has not come to its end.
        RuntimeError: it has, with an error.
    """
    until = time.perf_counter() + seconds
    if dist.get_backend() == "gloo":
        # What gloo sends to one rank is never seen to be complete unless it is waited for.
        try:
            work.wait(datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            if time.perf_counter() >= until:
                raise _StuckError(f"not done after {seconds:.0f} s") from error
            raise
        return
    # NCCL's wait is one of the GPU.
    while not work.is_completed():
        if time.perf_counter() > until:
            raise _StuckError(f"not done after {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    work.wait()


def _exchange(peer: int, out: torch.Tensor, into: torch.Tensor) -> list[Any]:
    """Sends `out` to another rank and receives as much."""
    operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
    return list(dist.batch_isend_irecv(operations))


def _all_reduce(zeros: torch.Tensor, group: Any) -> list[Any]:
    """Of zeros, which stay so."""
    return [dist.all_reduce(zeros, group=group, async_op=True)]


def _flops(device: torch.device) -> float:
    """Floating-point operations a second of this rank's matrix products."""
    side, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(2 * REPEATS):
        begin = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    del product
    return float(2 * side**3 / best)
