"""Time on a cluster: a ring's bytes, the slower of two networks, and what waits for what."""

from __future__ import annotations

import dataclasses

import pytest

from progscale.cost import GPUS, Cluster, Traffic, step_time
from progscale.cost.cluster import HOST_LINK, HOST_MEMORY

CLUSTER = Cluster(nodes=4, gpus=8, memory=80e9, flops=100e12, memory_bandwidth=2e12, within=300e9, between=25e9, latency=1e-5)
GIGABYTE = 10**9


def seconds(cluster: Cluster = CLUSTER, **given: float | Traffic) -> tuple[float, float, float]:
    values = {"flops": 0.0, "traffic": Traffic(), "bucket": 1e12, "state": 0.0, **given}
    time = step_time(cluster, **values)  # type: ignore[arg-type]
    return time.compute, time.communicate, time.update


def test_a_ring_sends_nearly_the_whole_tensor_and_twice_that_to_reduce_it_everywhere() -> None:
    assert Traffic(all_gather=1000).wire(4) == Traffic(reduce_scatter=1000).wire(4) == 750
    assert Traffic(all_reduce=1000).wire(4) == 1500
    assert Traffic(all_reduce=1000, all_gather=1000).wire(2) == 1500
    assert Traffic(1000, 10, 1).wire(1) == 0
    assert Traffic(1000, 10, 1).total == 1011
    copied = Traffic(all_gather=1000, gather_in_group=400, group=4)
    assert (copied.wire(8), copied.group_wire, copied.total) == (875, 300, 1400)
    assert Traffic(gather_in_group=400).group_wire == 0


def test_the_slower_network_takes_the_time() -> None:
    still = dataclasses.replace(CLUSTER, latency=0.0)
    sent = Traffic(all_gather=GIGABYTE)
    wire = GIGABYTE * 31 / 32
    assert seconds(still, traffic=sent)[1] == pytest.approx(wire / 25e9)
    assert seconds(dataclasses.replace(still, between=900e9), traffic=sent)[1] == pytest.approx(wire / 300e9)
    alone = dataclasses.replace(still, nodes=1)
    assert seconds(alone, traffic=sent)[1] == pytest.approx(GIGABYTE * 7 / 8 / 300e9), "one node sends nothing over the network"
    assert seconds(dataclasses.replace(still, gpus=1), traffic=sent)[1] == pytest.approx(GIGABYTE * 3 / 4 / 25e9)
    assert seconds(dataclasses.replace(alone, gpus=1), traffic=sent)[1] == 0


def test_a_group_of_ranks_on_one_node_spares_the_network() -> None:
    slow = dataclasses.replace(CLUSTER, latency=0.0)
    sent = Traffic(all_gather=GIGABYTE, gather_in_group=GIGABYTE, group=8)
    far, near = GIGABYTE * 31 / 32, GIGABYTE * 7 / 8
    assert seconds(slow, traffic=sent)[1] == pytest.approx(far / 25e9)
    assert seconds(dataclasses.replace(slow, between=1e30), traffic=sent)[1] == pytest.approx((far + near) / 300e9)
    wide = dataclasses.replace(sent, group=16)
    assert seconds(slow, traffic=wide)[1] == pytest.approx((far + GIGABYTE * 15 / 16) / 25e9), "two nodes have a copy together"
    odd = dataclasses.replace(sent, group=6)
    straddling = dataclasses.replace(slow, nodes=3)
    far_of_24, near_of_6 = GIGABYTE * 23 / 24, GIGABYTE * 5 / 6
    assert seconds(straddling, traffic=odd)[1] == pytest.approx((far_of_24 + near_of_6) / 25e9), "ranks 6 to 11 are on two nodes"
    # Buckets between nodes alone wait.
    waiting = dataclasses.replace(CLUSTER, within=1e30, between=1e30)
    assert seconds(waiting, traffic=sent, bucket=GIGABYTE)[1] == pytest.approx(1 * 1e-5 * 5)
    assert seconds(waiting, traffic=wide, bucket=GIGABYTE)[1] == pytest.approx(2 * 1e-5 * 5)


def test_every_bucket_waits_once_for_each_doubling_of_the_ranks() -> None:
    fast = dataclasses.replace(CLUSTER, within=1e30, between=1e30)
    sent = Traffic(all_reduce=10, all_gather=5, reduce_scatter=1)
    assert seconds(fast, traffic=sent, bucket=4)[1] == pytest.approx((3 + 2 + 1) * 1e-5 * 5)


def test_computing_and_the_update() -> None:
    compute, _, update = seconds(flops=32 * 100e12, state=1e12, moved=HOST_LINK)
    assert compute == pytest.approx(1.0)
    assert update == pytest.approx(1.0 + 1.0), "state is read and written, what goes to the CPU goes once"
    # Eight ranks of a node update in one CPU's memory.
    assert seconds(host_state=HOST_MEMORY / 8)[2] == pytest.approx(2.0)
    time = step_time(CLUSTER, flops=32 * 100e12, traffic=Traffic(all_gather=10 * GIGABYTE), bucket=1e12, state=0.0)
    assert time.shortest == time.compute and time.longest == time.compute + time.communicate


def test_what_makers_say_is_plausible() -> None:
    for name, gpu in GPUS.items():
        assert gpu.flops_16 > gpu.flops_32 > 1e13 and gpu.memory_bandwidth > gpu.link, name
        # The name has it.
        assert f"{gpu.memory / 1e9:.0f}gb" in name
