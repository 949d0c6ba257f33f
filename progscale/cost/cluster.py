"""Time of a step on a cluster: arithmetic over bandwidths that are given or measured.

Collectives are those of a ring. Of n ranks each sends (n - 1) / n of a tensor to gather or scatter it, and twice that to reduce
it everywhere; what a ring sends goes once over the network of each node, spread over all its cards, and once over the links
between the GPUs of a node. The slower of the two takes the time. To that comes a latency for each bucket, once for each doubling
of the ranks. Source of the ring: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (JPDC 2009).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank hands to collectives, by what those do; each counts the whole tensor.

    Attributes:
        all_reduce: of all ranks.
        all_gather: from all ranks.
        reduce_scatter: over all ranks.
        gather_in_group: from the ranks of a group.
        group: ranks of such a group.
    """

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    gather_in_group: int = 0
    group: int = 1

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.all_reduce + self.all_gather + self.reduce_scatter + self.gather_in_group

    @property
    def group_wire(self) -> float:
        """Bytes that each rank of a group's ring sends."""
        return self.gather_in_group * (self.group - 1) / self.group

    def wire(self, world_size: int) -> float:
        """Bytes that each rank of a ring of all sends."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world_size - 1) / world_size


@dataclass(frozen=True)
class Gpu:
    """What a maker says of a GPU.

    Attributes:
        memory: bytes.
        flops_16: a second, of matrix products of 16-bit numbers, dense.
        flops_32: of 32-bit numbers (not TF32, which torch leaves off).
        memory_bandwidth: bytes a second.
        link: bytes a second to the other GPUs of its node, one way.
    """

    memory: float
    flops_16: float
    flops_32: float
    memory_bandwidth: float
    link: float


# Data sheets of the makers: https://www.nvidia.com/en-us/data-center/ and, for the last one, the Ada architecture's whitepaper.
GPUS: Mapping[str, Gpu] = {
    "v100-32gb": Gpu(32e9, 125e12, 15.7e12, 0.9e12, 150e9),
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12, 1.555e12, 300e9),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12, 2.039e12, 300e9),
    "h100-80gb": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9),
    "h200-141gb": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9),
    "l40s-48gb": Gpu(48e9, 362e12, 91.6e12, 0.864e12, 32e9),
    "rtx4090-24gb": Gpu(24e9, 165e12, 82.6e12, 1.008e12, 32e9),
}
# Between GPU and CPU, 16 lanes of PCIe 4: for what is offloaded.
HOST_LINK = 25e9
# Of a node's CPU, bytes a second: eight channels of DDR4-3200. Its ranks share it.
HOST_MEMORY = 200e9


@dataclass(frozen=True)
class Cluster:
    """Nodes with as many GPUs each.

    Attributes:
        nodes: how many.
        gpus: of each node.
        memory: bytes of a GPU.
        flops: a second, which matrix products of a rank reach in the run's precision.
        memory_bandwidth: of a GPU, bytes a second.
        within: bytes a second that a rank sends to others of its node.
        between: bytes a second that a node sends to others, all its cards together.
        latency: seconds of a message between two nodes.
    """

    nodes: int
    gpus: int
    memory: float
    flops: float
    memory_bandwidth: float
    within: float
    between: float
    latency: float

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        compute: matrix products.
        communicate: collectives.
        update: of the weights, which reads and writes the optimizer's state.
    """

    compute: float
    communicate: float
    update: float

    @property
    def shortest(self) -> float:
        """All that is sent is sent while something is computed, as far as that takes so long."""
        return max(self.compute, self.communicate) + self.update

    @property
    def longest(self) -> float:
        """Nothing is."""
        return self.compute + self.communicate + self.update

    def to_json(self) -> dict[str, float]:
        """As plain data, in seconds."""
        return {
            "compute": self.compute,
            "communicate": self.communicate,
            "update": self.update,
            "shortest": self.shortest,
            "longest": self.longest,
        }


def step_time(
    cluster: Cluster, *, flops: float, traffic: Traffic, bucket: float, state: float, moved: float = 0.0, host_state: float = 0.0
) -> StepTime:
    """Time of a step.

    Args:
        cluster: on which.
        flops: floating-point operations of the step, over all ranks.
        traffic: of a rank.
        bucket: bytes of a collective at most.
        state: bytes on the GPU that the update reads and writes.
        moved: bytes that offload moves between the GPU and CPU memory.
        host_state: bytes in CPU memory that the update reads and writes there.
    """
    ranks = cluster.world_size
    wire, counts = traffic.wire(ranks), [traffic.all_reduce, traffic.all_gather, traffic.reduce_scatter]
    between = wire
    if cluster.gpus % traffic.group:
        # Some groups are on several nodes.
        between += traffic.group_wire
        counts.append(traffic.gather_in_group)
    slowest = between / cluster.between if cluster.nodes > 1 else 0.0
    if cluster.gpus > 1:
        slowest = max(slowest, (wire + traffic.group_wire) / cluster.within)
    calls = sum(math.ceil(count / bucket) for count in counts)
    waits = calls * cluster.latency * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0
    update = 2 * state / cluster.memory_bandwidth + 2 * host_state * cluster.gpus / HOST_MEMORY + moved / HOST_LINK
    return StepTime(flops / ranks / cluster.flops, slowest + waits, update)
