"""What the doctor says of names, ports, interfaces and settings."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from progscale.checks import Check
from progscale.launcher import Ranks
from progscale.network import (
    SIGNALS,
    TIMEOUT,
    Interface,
    interface_checks,
    interfaces,
    measured_checks,
    network_checks,
    setting_checks,
    signal_check,
)
from progscale.preflight import Network

GIB = 2**30
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
LAUNCHED |= {"MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "x"}
TWO_NODES, ONE_NODE = Ranks(4, 2, 0), Ranks(2, 2, 0)
THERE = [Interface("lo", ("127.0.0.1",)), Interface("eth0", ("10.0.0.7",), 25000), Interface("ib0", ("10.1.0.7",), 200000)]


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that somebody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield str(server.getsockname()[1])


def checked(port: str | None, ranks: Ranks, **changes: str) -> dict[str, Check]:
    environment = {**({} if port is None else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}), **changes}
    return {check.name.partition(": ")[2]: check for check in network_checks(environment, ranks)}


def test_a_port_in_use(taken: str) -> None:
    busy = checked(taken, Ranks(2, 2, 0))["port"]
    assert busy == Check("network: port", "problem", f"{taken}: Address already in use", "another MASTER_PORT")
    assert "port" not in checked(taken, Ranks(2, 1, 1)), "the port is rank 0's"
    held = checked(taken, Ranks(2, 2, 0), TORCHELASTIC_USE_AGENT_STORE="True")["port"]
    assert (held.status, held.found) == ("ok", f"{taken}, held by the launcher")
    assert checked(taken, Ranks(2, 2, 0), TORCHELASTIC_USE_AGENT_STORE="False")["port"].status == "problem"


def test_a_port_that_is_free(taken: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    assert checked(free, Ranks(2, 2, 0))["port"] == Check("network: port", "ok", f"{free} is free")
    assert checked(None, Ranks())["port"] == Check("network: port", "ok", "some port is free")


@pytest.mark.parametrize("port", ["http", "70000"])
def test_what_is_no_port(port: str) -> None:
    assert checked(port, Ranks(2, 2, 0))["port"].status == "problem"


def test_names_that_mean_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked("0", Ranks(2, 2, 0), MASTER_ADDR="::::")["main address"]
    assert found.status == "problem" and found.found.startswith("::::: ") and "MASTER_ADDR" in found.remedy
    assert checked("0", Ranks(2, 2, 0))["main address"].found == "127.0.0.1 is 127.0.0.1"
    monkeypatch.setattr(socket, "gethostname", lambda: "::::")
    assert checked(None, Ranks(2, 2, 0))["host name"].status == "note", "nobody needs it"


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, (SIGNALS, TIMEOUT)),
        ({"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}, (TIMEOUT,)),
        ({"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR10"}, (SIGNALS, TIMEOUT)),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, (SIGNALS,)),
        # What torchrun tells its ranks is what it does, wherever it had it from.
        ({"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM, SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "600"}, ()),
        (
            {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM", "PET_SIGNALS_TO_HANDLE": "SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "9"},
            (SIGNALS,),
        ),
    ],
)
def test_a_launcher_that_would_not_hand_signals_on(changes: dict[str, str], missing: tuple[str, ...]) -> None:
    check = signal_check({**LAUNCHED, **changes}, Ranks(4, 2, 0))
    assert check.status == ("note" if missing else "ok")
    assert tuple(check.remedy.splitlines()[1:]) == missing
    assert ("SIGUSR1 kills the launcher" in check.found) == (SIGNALS in missing)


@pytest.mark.parametrize(("environment", "ranks"), [({}, Ranks()), ({}, Ranks(4, 2, 0)), (LAUNCHED, Ranks(1, 1, 0))])
def test_without_a_launcher_of_several_ranks_the_variables_are_named(environment: dict[str, str], ranks: Ranks) -> None:
    check = signal_check(environment, ranks)
    assert check.status == "note"
    assert check.remedy.splitlines() == ["launch/launch.sh sets these:", SIGNALS, TIMEOUT]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", "'eth0' is eth0 (10.0.0.7, 25 Gbit/s)"),
        ("GLOO_SOCKET_IFNAME", "eth", None),
        ("GLOO_SOCKET_IFNAME", "eth9,ib0", "'eth9,ib0' is ib0 (10.1.0.7, 200 Gbit/s)"),
        ("NCCL_SOCKET_IFNAME", "eth", "'eth' is eth0 (10.0.0.7, 25 Gbit/s)"),
        ("NCCL_SOCKET_IFNAME", "=eth", None),
        ("NCCL_SOCKET_IFNAME", "=ib0", "'=ib0' is ib0 (10.1.0.7, 200 Gbit/s)"),
        ("NCCL_SOCKET_IFNAME", "^lo,ib", "'^lo,ib' is eth0 (10.0.0.7, 25 Gbit/s)"),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth", "'^=lo,eth' is eth0 (10.0.0.7, 25 Gbit/s), ib0 (10.1.0.7, 200 Gbit/s)"),
    ],
)
def test_an_interface_that_was_named(key: str, value: str, found: str | None) -> None:
    """Gloo takes whole names, NCCL beginnings, `=` whole ones, `^` all others."""
    (check,) = interface_checks({key: value}, ONE_NODE, THERE, on_gpu=True)
    if found is None:
        assert check.status == "problem" and check.remedy == "unset it, or one of lo, eth0, ib0"
    else:
        assert check == Check(f"network: {key}", "ok", found)


def test_the_interface_on_the_way_to_the_head() -> None:
    """Asked of this machine, for gloo, where ranks are on several."""
    environment = {"MASTER_ADDR": "127.0.0.1"}
    (check,) = interface_checks(environment, TWO_NODES, interfaces(), on_gpu=False)
    assert check.status == "ok" and check.found.startswith("on the way to the head: lo (127.0.0.1")
    assert interface_checks(environment, ONE_NODE, interfaces(), on_gpu=False) == []
    assert interface_checks(environment, TWO_NODES, interfaces(), on_gpu=True) == [], "NCCL looks for itself"
    (check,) = interface_checks({"MASTER_ADDR": "no.such.host.invalid"}, TWO_NODES, interfaces(), on_gpu=False)
    assert check.status == "problem" and "MASTER_ADDR" in check.remedy


def settings(
    environment: dict[str, str], ranks: Ranks = TWO_NODES, devices: tuple[str, ...] = ("mlx5_0",), **given: int
) -> set[str]:
    """Names of the checks that are not ok."""
    sizes = {"locked": -1, "shared_memory": 64 * GIB, **given}
    checks = setting_checks(environment, ranks, devices, on_gpu=True, **sizes)
    assert all(check.remedy for check in checks if check.status == "problem")
    return {check.name.partition(": ")[2] for check in checks if check.status != "ok"}


def test_settings_that_were_left_on() -> None:
    """Each is a search for a mistake, and slows all that come after."""
    assert settings({}) == set()
    assert settings({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"}) == {"NCCL_P2P_DISABLE"}
    assert settings({"NCCL_IB_DISABLE": "1"}) == {"NCCL_IB_DISABLE"}
    assert settings({"NCCL_IB_DISABLE": "1"}, devices=()) == {"RDMA"}, "nothing is lost where there is none"
    assert settings({"TORCH_DISTRIBUTED_DEBUG": "detail"}) == {"TORCH_DISTRIBUTED_DEBUG"}
    assert settings({"TORCH_DISTRIBUTED_DEBUG": "INFO"}) == set()
    assert settings({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}) == {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}


def test_limits_that_keep_nccl_from_working() -> None:
    """Memory that RDMA may register, and where the ranks of a node meet."""
    assert settings({}, locked=2**16) == {"locked memory"}
    assert settings({}, locked=2**16, devices=()) == {"RDMA"}
    assert settings({}, shared_memory=2**26) == {"shared memory"}
    assert settings({}, Ranks(2, 1, 0), shared_memory=2**26) == set(), "one rank on each node meets nobody"
    on_cpu = setting_checks({}, TWO_NODES, (), on_gpu=False, locked=2**16, shared_memory=2**26)
    assert on_cpu == [], "gloo needs neither"


def measured(links: list[tuple[int, int, float]], flops: list[float]) -> list[str]:
    """What is said to be slow among nodes a, b, c, d."""
    nodes = tuple("abcd"[: len(flops)])
    found = measured_checks(Network(nodes, 8, tuple(links), 1e9, 4e9, 2e-5, tuple(flops), "bf16", 2**26), 0.5)
    assert found[0] == Check("network: measured", "ok", found[0].found)
    return [check.found for check in found[1:]]


def test_a_slow_node_and_a_slow_link_are_named() -> None:
    """A node all of whose links are slow is; its neighbours, who have another one, are not."""
    same = [1e12] * 4
    ring = [(0, 1, 10e9), (1, 2, 10e9), (2, 3, 10e9), (0, 3, 10e9)]
    assert measured(ring, same) == []
    assert measured([(0, 1, 1e9), (1, 2, 1e9), (2, 3, 10e9), (0, 3, 10e9)], same) == [
        "b exchanges 1 GB/s with its neighbours, others 10 GB/s"
    ]
    assert measured([(0, 1, 1e9), *ring[1:]], same) == ["a and b exchange 1 GB/s, others 10 GB/s"]
    assert measured(ring, [1e12, 1e12, 4e11, 1e12]) == ["c computes 400 GFLOP/s a rank, others 1e+03"]
    assert measured([(0, 1, 5.0)], [1e12, 1e12]) == [], "of two nodes nobody can say which one's link it is"
    assert measured([], [1e12]) == []
