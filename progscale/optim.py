"""Stage → param groups: one pure description, from which every engine builds the stage and its optimizer anew.

One param group for each (part, weight decay), where a part is a set of blocks that are live in the same stages. A
part that freezes later therefore never shares a flat ZeRO buffer with another, and a surviving group is flattened and
sharded alike before and after a switch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from progscale.blocks import ParameterInfo, Partition
from progscale.methods import Trainable, live_parameters
from progscale.schedule import Stage


@dataclass(frozen=True)
class GroupSpec:
    """One optimizer param group.

    Attributes:
        part: "embeddings", "head", or the first and last block of the part ("blocks 0-3").
        weight_decay: of all its tensors.
        names: of its tensors, in the order of the model.
    """

    part: str
    weight_decay: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class StageBuild:
    """All that an engine needs to build a stage; equal builds give equal engines.

    Attributes:
        stage: which one.
        groups: param groups; every live parameter is in exactly one.
    """

    stage: Stage
    groups: tuple[GroupSpec, ...]

    @property
    def live(self) -> frozenset[str]:
        """Names of the trained parameters."""
        return frozenset(name for group in self.groups for name in group.names)


def build_for(
    stages: Sequence[Stage],
    partition: Partition,
    method: Trainable,
    *,
    weight_decay: float = 0.0,
    decay_bias_and_norm: bool = False,
    decayed: Collection[str] | None = None,
) -> tuple[StageBuild, ...]:
    """The builds of all stages.

    Args:
        stages: of the schedule.
        partition: of the model, after the method prepared it.
        method: names the trainable tensors.
        weight_decay: for tensors of two or more dimensions.
        decay_bias_and_norm: also for biases and norm weights, the tensors of one dimension.
        decayed: names of the tensors that are decayed, instead of the two rules.
    """
    live = [frozenset(live_parameters(stage, partition, method)) for stage in stages]
    buckets: dict[tuple[str, tuple[bool, ...], float], list[ParameterInfo]] = {}
    for info in partition.parameters.values():
        signature = tuple(info.name in names for names in live)
        if not any(signature):
            continue
        # Biases and norms are the tensors of one dimension in every Transformer.
        is_decayed = decay_bias_and_norm or len(info.shape) > 1 if decayed is None else info.name in decayed
        decay = weight_decay if is_decayed else 0.0
        kind = info.stack if info.part == "block" else info.part
        assert kind is not None
        buckets.setdefault((kind, signature, decay), []).append(info)
    specs = [
        (signature, GroupSpec(_part_name(infos), decay, tuple(info.name for info in infos)))
        for (_, signature, decay), infos in buckets.items()
    ]
    return tuple(
        StageBuild(stage, tuple(spec for signature, spec in specs if signature[index])) for index, stage in enumerate(stages)
    )


def _part_name(infos: Sequence[ParameterInfo]) -> str:
    if infos[0].part != "block":
        return infos[0].part
    blocks = [info.block for info in infos if info.block is not None]
    return f"{infos[0].stack} {min(blocks)}-{max(blocks)}"
