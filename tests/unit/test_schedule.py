"""Schedules: the paper's values, and what must hold for every number of blocks and stages."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progscale.errors import RegistryError, ScheduleError
from progscale.schedule import SCHEDULES, Request, build_stages, even_first_blocks, stage_at, stage_starts

counts = st.integers(1, 64)


def live(name: str, blocks: int, stages: int, **options: object) -> list[list[int]]:
    return [list(stage) for stage in SCHEDULES.get(name)(Request(blocks, stages, options))]


@pytest.mark.parametrize(
    ("blocks", "stages", "firsts"),
    [
        (12, 3, [0, 4, 8]),
        (24, 3, [0, 8, 16]),
        (12, 5, [0, 2, 4, 7, 9]),
        (12, 8, [0, 1, 3, 4, 6, 7, 9, 10]),
        (12, 1, [0]),
        (3, 6, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_even_rule_gives_the_papers_blocks(blocks: int, stages: int, firsts: list[int]) -> None:
    assert even_first_blocks(blocks, stages) == firsts
    assert [stage[0] for stage in live("progtuning", blocks, stages)] == firsts


@given(counts, counts)
def test_progtuning_shrinks_from_all_blocks_to_a_non_empty_last_stage(blocks: int, stages: int) -> None:
    found = live("progtuning", blocks, stages)
    assert len(found) == stages
    assert found[0] == list(range(blocks))
    assert found[-1]
    assert all(set(later) <= set(earlier) for earlier, later in itertools.pairwise(found))
    # A block's lowest stage puts every block in exactly one part.
    parts = [set(a) - set(b) for a, b in zip(found, [*found[1:], []], strict=True)]
    assert sorted(block for part in parts for block in part) == list(range(blocks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(counts, counts)
def test_growing_is_progtuning_in_reverse(blocks: int, stages: int) -> None:
    assert live("growing", blocks, stages) == live("progtuning", blocks, stages)[::-1]


@given(counts, counts)
def test_without_low_blocks_is_one_stage_ahead_and_ends_with_the_head_alone(blocks: int, stages: int) -> None:
    found = live("without_low_blocks", blocks, stages)
    assert found[-1] == []
    assert found[:-1] == live("progtuning", blocks, stages)[1:]


@given(counts, counts, st.one_of(st.floats(1e-9, 1e9), st.integers(1, 1000)))
def test_equal_weights_give_the_even_rule(blocks: int, stages: int, weight: float) -> None:
    assert live("weighted", blocks, stages, block_weights=[weight] * blocks) == live("progtuning", blocks, stages)


@given(st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=32), counts)
def test_weighted_stages_start_whole_and_shrink(weights: list[float], stages: int) -> None:
    found = live("weighted", len(weights), stages, block_weights=weights)
    assert found[0] == list(range(len(weights)))
    assert found[-1]
    assert all(set(later) <= set(earlier) for earlier, later in itertools.pairwise(found))


def test_weighted_reads_decimals_as_they_are_written() -> None:
    # 0.1 + 0.2 is half of 0.6, though not in binary floating point.
    assert live("weighted", 3, 2, block_weights=[0.1, 0.2, 0.3]) == [[0, 1, 2], [2]]


def test_a_block_of_tiny_weight_is_trained_in_the_first_stage() -> None:
    assert live("weighted", 2, 2, block_weights=[1e-12, 1.0])[0] == [0, 1]


@given(counts, st.integers(1, 5000))
def test_stage_starts_follow_the_closed_form(stages: int, steps: int) -> None:
    if stages > steps:
        with pytest.raises(ScheduleError, match=f"{stages} stages for a run of {steps} optimizer steps"):
            stage_starts(stages, steps)
        return
    starts = stage_starts(stages, steps)
    assert starts == [t * steps // stages for t in range(stages)]
    assert all(a < b for a, b in zip(starts, [*starts[1:], steps], strict=True))


@given(
    st.sampled_from(["progtuning", "none", "without_low_blocks", "growing"]),
    counts,
    counts,
    st.sampled_from(["always", "first_stage", "never"]),
)
def test_stages_cover_all_steps_and_are_plain_data(name: str, blocks: int, stages: int, embeddings: str) -> None:
    built = build_stages(name, num_blocks={"a": blocks, "b": 2}, stages=stages, total_steps=200, embeddings=embeddings)
    again = build_stages(name, num_blocks={"a": blocks, "b": 2}, stages=stages, total_steps=200, embeddings=embeddings)
    assert built == again
    assert [stage.index for stage in built] == list(range(1, stages + 1))
    assert built[0].start_step == 0
    assert built[-1].end_step == 200
    assert all(a.end_step == b.start_step for a, b in itertools.pairwise(built))
    assert sum(stage.steps for stage in built) == 200
    for step in (0, 99, 199):
        stage = stage_at(built, step)
        assert stage.start_step <= step < stage.end_step
    assert stage_at(built, 200) is built[-1]
    policy = {"always": [True] * stages, "first_stage": [True] + [False] * (stages - 1), "never": [False] * stages}
    assert [stage.embeddings for stage in built] == policy[embeddings]
    for stage in built:
        assert json.loads(json.dumps(dict(stage.live_blocks))) == {key: list(v) for key, v in stage.live_blocks.items()}
        assert stage.first_block({"a": blocks, "b": 2})["a"] == min(stage.live_blocks["a"], default=blocks)
        assert all(stage.is_live("a", block) == (block in stage.live_blocks["a"]) for block in range(blocks))


def test_stage_at_refuses_steps_outside_the_run() -> None:
    built = build_stages("none", num_blocks={"blocks": 2}, stages=1, total_steps=3)
    with pytest.raises(ValueError, match=r"step 4 is outside the run of 3 steps"):
        stage_at(built, 4)


def test_custom_stages_and_starts() -> None:
    built = build_stages(
        "custom",
        num_blocks={"blocks": 4},
        stages=3,
        total_steps=10,
        options={"first_blocks": [2, 0, 4], "starts": [0, 1, 9]},
    )
    assert [stage.live_blocks["blocks"] for stage in built] == [(2, 3), (0, 1, 2, 3), ()]
    assert [(stage.start_step, stage.end_step) for stage in built] == [(0, 1), (1, 9), (9, 10)]


def test_options_by_stack() -> None:
    stacks = {"encoder": 4, "decoder": 2}
    built = build_stages(
        "custom",
        num_blocks=stacks,
        stages=2,
        total_steps=10,
        options={"first_blocks": {"encoder": [0, 3], "decoder": [2, 0]}},
    )
    assert [stage.live_blocks for stage in built] == [
        {"encoder": (0, 1, 2, 3), "decoder": ()},
        {"encoder": (3,), "decoder": (0, 1)},
    ]
    assert built[0].first_block(stacks) == {"encoder": 0, "decoder": 2}
    weights = {"encoder": [3, 1, 1, 1], "decoder": [1, 1]}
    weighted = build_stages("weighted", num_blocks=stacks, stages=2, total_steps=10, options={"block_weights": weights})
    assert [stage.live_blocks["encoder"][0] for stage in weighted] == [0, 1]
    even = build_stages("progtuning", num_blocks=stacks, stages=2, total_steps=10)
    assert even[1].first_block(stacks) == {"encoder": 2, "decoder": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": [0, 1]},
            r"first_blocks: given for encoder; the model's stacks of blocks are encoder, decoder: give one list",
        ),
        ({"encoder": [0, 1], "decoder": [0, 1], "x": [0, 1]}, "given for encoder, decoder, x"),
        ({"encoder": [0, 1], "decoder": [0, 3]}, r"3 is not a block; .* \(stack 'decoder'\)"),
        ([0, 4], r"4 is not a block; the model has 2 blocks.* \(stack 'decoder'\)"),
    ],
)
def test_mistakes_with_stacks_are_named(options: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build_stages(
            "custom", num_blocks={"encoder": 4, "decoder": 2}, stages=2, total_steps=10, options={"first_blocks": options}
        )


@pytest.mark.parametrize(
    ("name", "stages", "options", "message"),
    [
        ("progtuning", 0, {}, "schedule.stages: 0; at least 1"),
        ("progtuning", 11, {}, "11 stages for a run of 10 optimizer steps; at most 10"),
        ("custom", 2, {}, "schedule.first_blocks: missing"),
        ("custom", 2, {"first_blocks": [0]}, "1 entries for 2 stages"),
        ("custom", 2, {"first_blocks": [0, 5]}, "5 is not a block; the model has 4 blocks"),
        ("custom", 2, {"first_blocks": [0, -1]}, "-1 is not a block"),
        ("custom", 2, {"first_blocks": [1, 2]}, "never trains the blocks below 1"),
        ("weighted", 2, {}, "schedule.block_weights: missing"),
        ("weighted", 2, {"block_weights": [1, 1]}, "2 weights for a model of 4 blocks"),
        ("weighted", 2, {"block_weights": [1, 0, 1, 1]}, "every weight must be above 0"),
        ("weighted", 2, {"block_weights": [1, float("nan"), 1, 1]}, "every weight must be above 0"),
        ("weighted", 2, {"block_weights": [1, float("inf"), 1, 1]}, "above 0 and finite"),
        ("none", 2, {"starts": [1, 2]}, "2 ascending optimizer steps are needed, the first of them 0"),
        ("none", 2, {"starts": [0, 0]}, "2 ascending optimizer steps"),
        ("none", 2, {"starts": []}, "2 ascending optimizer steps"),
        ("none", 2, {"starts": [0, 10]}, "10 lies beyond the run's 10 optimizer steps"),
    ],
)
def test_mistakes_are_named(name: str, stages: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build_stages(name, num_blocks={"blocks": 4}, stages=stages, total_steps=10, options=options)


def test_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(RegistryError, match=r"no schedule 'progtunning'.*did you mean 'progtuning'"):
        build_stages("progtunning", num_blocks={"blocks": 4}, stages=2, total_steps=10)


@pytest.mark.parametrize(
    ("given_blocks", "message"),
    [([[0]], "gave 1 stages for 'blocks'; asked for 2"), ([[0], [4]], "gave blocks \\[4\\]"), ([[0], [1, 0]], "gave blocks")],
)
def test_somebody_elses_schedule_is_checked(given_blocks: list[list[int]], message: str) -> None:
    SCHEDULES.add("test-broken", lambda request: given_blocks)
    try:
        with pytest.raises(ScheduleError, match=message):
            build_stages("test-broken", num_blocks={"blocks": 4}, stages=2, total_steps=10)
    finally:
        SCHEDULES.remove("test-broken")
