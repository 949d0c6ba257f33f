"""DeepSpeed configs that differ by stage: what they are, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from progscale.config import Config, load_config
from progscale.config.stages import laid_over, stages_of
from progscale.errors import ConfigError

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def config(by_stage: Any, deepspeed: Any = {"zero_optimization": {"stage": 2}}, **more: Any) -> Config:  # noqa: B006
    return load_config([{"engine": {"deepspeed": deepspeed, "by_stage": by_stage}, **more}])


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("2", [2]),
        ("2-4", [2, 3, 4]),
        ("3-", [3, 4, 5]),
        ("4-2", []),
        ("0", None),
        ("-3", None),
        ("a", None),
        ("1,2", None),
        ("", None),
    ],
)
def test_names_of_stages(text: str, stages: list[int] | None) -> None:
    found = stages_of(text, 5)
    assert (None if found is None else list(found)) == stages


def test_what_a_stage_has() -> None:
    found = config({"1": {"zero_optimization": OFFLOAD}, "3-": {"zero_optimization": {"stage": 1, "overlap_comm": True}}})
    blocks = [found.deepspeed_of(stage) for stage in (1, 2, 3)]
    assert blocks == [
        {"zero_optimization": {"stage": 2, **OFFLOAD}},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 1, "overlap_comm": True}},
    ]
    assert Config().deepspeed_of(1) is None


def test_objects_are_merged_and_neither_side_changes() -> None:
    base, block = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"b": 2}, "d": {"e": 3}}
    assert laid_over(base, block) == {"a": {"b": 2, "c": [1]}, "d": {"e": 3}}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 1}


@pytest.mark.parametrize(
    ("by_stage", "message"),
    [
        ({"first": {}}, r'engine\.by_stage: "first" names no stages; write one'),
        ({"3-2": {}}, r'engine\.by_stage: "3-2" names no stages'),
        ({"4": {}}, r"engine\.by_stage\.4: the run has 3 stages"),
        ({"1-2": {}, "2": {}}, r'engine\.by_stage\.2: stage 2 is in "1-2" too'),
        ({"1": {"train_batch_size": 8}}, r"engine\.by_stage\.1\.train_batch_size: is one for all stages"),
        ({"1": {"zero_optimisation": {}}}, r"engine\.by_stage\.1\.zero_optimisation: is not a key of DeepSpeed"),
        ({"1": {"zero_optimization": {"stage": 3}}}, r"zero_optimization\.stage: 3 beside 2 in engine\.deepspeed: under ZeRO-3"),
        ({"1": {"zero_optimization": {"stage": 5}}}, r"engine\.by_stage\.1\.zero_optimization\.stage: 5 must be 1, 2 or 3"),
        (
            {"1": {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}},
            r'engine\.by_stage\.1\.zero_optimization\.offload_optimizer\.device: "gpu" must be "cpu" or "none"',
        ),
        ({"1": 3}, r"engine\.by_stage: 3 .*must be an object"),
    ],
)
def test_what_cannot_be(by_stage: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(by_stage)


def test_it_changes_what_is_there() -> None:
    with pytest.raises(ConfigError, match=r"engine\.by_stage: needs engine\.deepspeed"):
        config({"1": {}}, None)
    with pytest.raises(ConfigError, match=r"offload_param: is one for all stages"):
        config({"1": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}, {"zero_optimization": {"stage": 3}})


def test_a_paged_optimizer_meets_no_offload_in_any_stage() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name: \"paged_adamw\""):
        config({"2": {"zero_optimization": OFFLOAD}}, optimizer={"name": "paged_adamw"})
