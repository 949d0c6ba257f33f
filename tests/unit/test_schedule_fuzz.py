"""Every schedule for up to 64 blocks and 64 stages: parts that cover the blocks once, and stages that survive JSON."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import example
from hypothesis import strategies as st

from progscale.errors import ScheduleError
from progscale.resume import stage_values
from progscale.schedule import Stage, build_stages
from tests.harness.fuzz import fuzz

COUNTS = st.integers(1, 64)
FIXED = ("progtuning", "none", "without_low_blocks", "growing")
EMBEDDINGS = st.sampled_from(["always", "first_stage", "never"])


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    """What `build_stages` is asked for: any schedule, with options that fit it."""
    blocks, stages = draw(COUNTS), draw(COUNTS)
    name = draw(st.sampled_from([*FIXED, "custom", "weighted"]))
    options: dict[str, Any] = {}
    if name == "custom":
        firsts = draw(st.lists(st.integers(0, blocks), min_size=stages, max_size=stages))
        firsts[draw(st.integers(0, stages - 1))] = 0
        options["first_blocks"] = firsts
    if name == "weighted":
        options["block_weights"] = draw(st.lists(st.floats(1e-9, 1e9), min_size=blocks, max_size=blocks))
    steps = draw(st.integers(stages, 5000))
    if draw(st.booleans()):
        later = st.lists(st.integers(1, max(1, steps - 1)), min_size=stages - 1, max_size=stages - 1, unique=True)
        options["starts"] = [0, *sorted(draw(later))]
    asked_for = {"name": name, "num_blocks": {"blocks": blocks}, "stages": stages, "total_steps": steps}
    return {**asked_for, "embeddings": draw(EMBEDDINGS), "options": options}


def from_json(index: int, values: list[Any]) -> Stage:
    """The stage that `stage_values` told of."""
    start, end, live, embeddings = values
    blocks = {}
    for stack, text in live.items():
        runs = [tuple(map(int, run.split("-"))) for run in text.split(",") if run]
        blocks[stack] = tuple(block for first, last in runs for block in range(first, last + 1))
    return Stage(index, start, end, blocks, embeddings)


@fuzz(asked())
def test_stages_cover_the_run_are_the_same_again_and_survive_json(wanted: dict[str, Any]) -> None:
    stages = build_stages(**wanted)
    assert build_stages(**wanted) == stages
    bounds = [0, *(stage.end_step for stage in stages)]
    assert [(stage.start_step, stage.end_step) for stage in stages] == list(itertools.pairwise(bounds))
    assert bounds[-1] == wanted["total_steps"] and all(stage.steps for stage in stages)
    assert {block for stage in stages for block in stage.live_blocks["blocks"]} <= set(range(wanted["num_blocks"]["blocks"]))
    back = [from_json(stage.index, json.loads(json.dumps(stage_values(stage)))) for stage in stages]
    assert tuple(back) == stages


@fuzz(COUNTS, COUNTS, st.sampled_from([*FIXED, "custom", "weighted"]))
@example(1, 64, "progtuning")
@example(64, 1, "progtuning")
def test_every_block_is_in_one_part_and_trained_at_some_time(blocks: int, stages: int, name: str) -> None:
    """A block's part is the last stage that trains it, for schedules that shrink; `growing` is read backwards."""
    options: dict[str, Any] = {"first_blocks": [t * blocks // stages for t in range(stages)], "block_weights": [0.3] * blocks}
    built = build_stages(name, num_blocks={"blocks": blocks}, stages=stages, total_steps=stages, options=options)
    live = [set(stage.live_blocks["blocks"]) for stage in built][:: -1 if name == "growing" else 1]
    assert all(later <= earlier for earlier, later in itertools.pairwise(live)), "nested"
    # What Eq. 4 leaves out of its first stage is a part too; under `none` the last stage trains every block.
    everything = set(range(blocks))
    parts = [earlier - later for earlier, later in itertools.pairwise([everything, *live, set()])]
    assert sorted(block for part in parts for block in part) == sorted(everything)
    if name != "without_low_blocks":
        assert live[0] == everything and live[-1], "from all blocks to a stage that still trains some"


def stages_or_complaint(**wanted: Any) -> tuple[Stage, ...] | str:
    """The stages, or what is said instead; any other exception fails the test."""
    try:
        return build_stages(**wanted)
    except ScheduleError as error:
        return str(error)


@fuzz(st.integers(1, 70), st.integers(-3, 70), st.integers(0, 70), st.lists(st.integers(-2, 70), max_size=5))
def test_any_numbers_give_stages_or_one_line(blocks: int, stages: int, steps: int, numbers: list[int]) -> None:
    for name in (*FIXED, "custom", "weighted"):
        options = {"first_blocks": numbers, "block_weights": numbers, "starts": numbers or None}
        found = stages_or_complaint(name=name, num_blocks={"blocks": blocks}, stages=stages, total_steps=steps, options=options)
        if isinstance(found, str):
            assert found.startswith("schedule.") and "\n" not in found
        else:
            assert len(found) == stages >= 1 and found[-1].end_step == steps
