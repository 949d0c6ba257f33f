"""Param groups: every live tensor in one group, and no group that a later stage would have to cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from progscale.blocks import Partition, partition
from progscale.methods import METHODS, live_parameters
from progscale.models.family import FAMILIES
from progscale.models.loading import family_of
from progscale.optim import StageBuild, build_for
from progscale.optimizers import AdamW
from progscale.schedule import SCHEDULES, Stage, build_stages
from tests.harness.refused import by_family
from tests.tiny import FAMILY_NAMES, method_for, tiny_model

BLOCKS, DECAY = 4, 0.01


@cache
def parts_of(family: str, method: str = "full") -> Partition:
    with torch.device("meta"):
        return partition(method_for(family, method).prepare(tiny_model(family, blocks=BLOCKS)), FAMILIES.get(family))


def stages_of(schedule: str, embeddings: str, stages: int, stacks: Sequence[str] = ("blocks",)) -> tuple[Stage, ...]:
    firsts = [[2, 0, 4, 1, 3, 0, 2][index % 7] for index in range(stages)]
    firsts[-1] = 0
    options = {"custom": {"first_blocks": firsts}, "weighted": {"block_weights": [1.0, 5.0, 1.0, 1.0]}, "only": {"blocks": [1]}}
    return build_stages(
        schedule,
        num_blocks=dict.fromkeys(stacks, BLOCKS),
        stages=stages,
        total_steps=20,
        embeddings=embeddings,  # type: ignore[arg-type]
        options=options.get(schedule, {}),
    )


@settings(deadline=None)  # the first case of a family builds its model
@given(
    st.sampled_from(FAMILY_NAMES),
    st.sampled_from(SCHEDULES.names()),
    st.sampled_from(["always", "first_stage", "never"]),
    st.integers(1, 7),
    st.sampled_from(METHODS.names()),
    st.booleans(),
)
def test_groups(family: str, schedule: str, embeddings: str, count: int, name: str, decay_all: bool) -> None:
    assume(by_family(name, family) is None)
    parts, method = parts_of(family, name), method_for(family, name)
    stages = stages_of(schedule, embeddings, count, list(parts.num_blocks))
    builds = build_for(stages, parts, method, weight_decay=DECAY, decay_bias_and_norm=decay_all)
    assert [build.stage for build in builds] == list(stages)
    for build in builds:
        grouped = [name for group in build.groups for name in group.names]
        live = live_parameters(build.stage, parts, method)
        assert sorted(grouped) == sorted(live), "each live tensor stands in one group"
        assert build.live == frozenset(live)
        for group in build.groups:
            assert group.names, "DeepSpeed cannot take an empty group"
            assert list(group.names) == [name for name in parts.parameters if name in group.names], "order of the model"
            assert len({parts.parameters[name].part for name in group.names}) == 1
            for name in group.names:
                is_matrix = len(parts.parameters[name].shape) > 1
                assert group.weight_decay == (DECAY if is_matrix or decay_all else 0.0), name
    no_group_is_ever_cut(builds)


def no_group_is_ever_cut(builds: tuple[StageBuild, ...]) -> None:
    """A part that freezes later never shares a flat buffer with another: a group lives whole or not at all."""
    groups = {group for build in builds for group in build.groups}
    for build in builds:
        for group in groups:
            alive = set(group.names) & build.live
            assert not alive or group in build.groups
    survivors = [[group for group in build.groups if group in builds[0].groups] for build in builds]
    first = list(builds[0].groups)
    for kept in survivors:
        assert kept == [group for group in first if group in kept], "surviving groups keep their order"


def test_equal_calls_give_equal_builds() -> None:
    stages = stages_of("progtuning", "first_stage", 3)
    again = stages_of("progtuning", "first_stage", 3)
    model = tiny_model("bert", blocks=BLOCKS)
    fresh = partition(model, family_of(model))
    assert build_for(stages, parts_of("bert"), method_for("bert"), weight_decay=DECAY) == build_for(
        again, fresh, method_for("bert"), weight_decay=DECAY
    )


def test_groups_by_name() -> None:
    builds = build_for(stages_of("progtuning", "first_stage", 2), parts_of("bert"), method_for("bert"), weight_decay=DECAY)
    named = [sorted({group.part for group in build.groups}) for build in builds]
    assert named == [["blocks 0-1", "blocks 2-3", "embeddings", "head"], ["blocks 2-3", "head"]]
    assert [len(build.groups) for build in builds] == [8, 4]


@pytest.mark.parametrize("fused", [None, True, False])
def test_the_optimizer_takes_the_groups(fused: bool | None) -> None:
    model = tiny_model("bert", blocks=BLOCKS)
    parameters = dict(model.named_parameters())
    build = build_for(stages_of("progtuning", "always", 2), parts_of("bert"), method_for("bert"), weight_decay=DECAY)[1]
    optimizer = AdamW(betas=(0.8, 0.9), eps=1e-6, fused=fused).build(parameters, build.groups)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    # None leaves torch its faster way without fused kernels; False would take the slowest one.
    assert optimizer.defaults["fused"] is (None if fused is False else True)
    for group, spec in zip(optimizer.param_groups, build.groups, strict=True):
        assert group["weight_decay"] == spec.weight_decay
        assert [id(tensor) for tensor in group["params"]] == [id(parameters[name]) for name in spec.names]
