"""Generated configs: valid ones come back equal, one spoilt leaf is named, and nothing but ConfigError is raised."""

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from progscale.config import Config, describe_schema, dump_config, format_set, load_config, parse_set
from progscale.config.kinds import accepts
from progscale.config.schema import SECTIONS
from progscale.errors import ConfigError
from tests.harness.fuzz import fuzz

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.text("abcdefghijklmnopqrstuvwxyzäß -_", min_size=1, max_size=12).filter(lambda word: word.strip())

# What the schema alone cannot say: values that other options constrain.
VALID: dict[str, st.SearchStrategy[Any]] = {
    "description": st.none() | st.text(max_size=20),
    "run.name": st.none() | WORDS,
    "run.output_dir": WORDS,
    "run.seed": st.integers(0, 2**32 - 1),
    "run.threads": st.none() | st.integers(1, 64),
    "model.name": WORDS,
    "model.revision": st.none() | WORDS,
    "model.family": st.none() | WORDS,
    "model.random_weights": st.booleans(),
    "model.overrides": st.dictionaries(WORDS, st.integers() | st.text(max_size=5) | st.booleans(), max_size=3),
    "model.tokenizer": st.none() | WORDS,
    "task.name": st.sampled_from(["demo", "cola", "stsb"]),
    "task.max_train_examples": st.none() | st.integers(1, 10**9),
    "task.max_eval_examples": st.none() | st.integers(1, 10**9),
    "task.metric": st.none() | WORDS,
    "method.name": WORDS,
    "schedule.name": st.sampled_from(["progtuning", "none", "growing", "without_low_blocks"]),
    "schedule.stages": st.none() | st.integers(1, 100),
    "schedule.embeddings": st.sampled_from(["always", "first_stage", "never"]),
    "optimizer.lr": st.floats(1e-12, 100),
    "optimizer.weight_decay": st.floats(0, 1),
    "optimizer.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "optimizer.eps": st.floats(1e-12, 1),
    "optimizer.decay_bias_and_norm": st.booleans(),
    "optimizer.lr_schedule": st.sampled_from(["linear", "cosine", "polynomial", "constant"]),
    "optimizer.warmup_fraction": st.none() | st.floats(0, 0.99),
    "optimizer.final_lr_fraction": st.floats(0, 1),
    "optimizer.power": st.floats(0.1, 10),
    "optimizer.restart_each_stage": st.booleans(),
    "train.epochs": st.floats(0.01, 1000) | st.integers(1, 100),
    "train.max_steps": st.none() | st.integers(1, 10**9),
    "train.micro_batch_size": st.none() | st.integers(1, 16),
    "train.global_batch_size": st.integers(16, 4096),
    "train.max_tokens_per_micro_batch": st.none() | st.integers(1, 10**6),
    "train.eval_batch_size": st.integers(1, 512),
    "train.max_length": st.integers(1, 512),
    "train.precision": st.sampled_from(["fp32", "bf16", "fp16"]),
    "train.gradient_checkpointing": st.booleans(),
    "train.max_grad_norm": st.none() | st.floats(0.01, 100),
    "train.group_by_length": st.booleans(),
    "train.num_workers": st.integers(0, 8),
    "train.logging_steps": st.integers(1, 1000),
    "train.evaluate": st.sampled_from(["epoch", "stage", "end"]),
    "train.save_model": st.sampled_from(["best", "last", "none"]),
    "train.nonfinite": st.just("stop") | st.integers(1, 999).map(lambda number: f"skip:{number}"),
    "train.fused_optimizer": st.none() | st.booleans(),
    "model.attention": st.sampled_from(["auto", "eager", "sdpa"]),
    "engine.timeout_seconds": st.integers(1, 10**6),
    "engine.preflight": st.sampled_from(["auto", "off"]),
    "checkpoint.every_steps": st.none() | st.integers(1, 10**6),
    "checkpoint.at_epochs": st.booleans(),
    "checkpoint.at_stages": st.booleans(),
    "checkpoint.keep": st.integers(2, 10**6),
    "checkpoint.background": st.booleans(),
    "checkpoint.shard_megabytes": st.integers(1, 100_000),
    "checkpoint.on_error": st.sampled_from(["stop", "warn"]),
    "trackers.names": st.lists(st.sampled_from(["tensorboard", "mlflow", "wandb", "trackio"]), unique=True),
    "trackers.project": st.text("abc", min_size=1, max_size=5),
}
# Options whose value is right or wrong by what others have: they are drawn where their combinations are tested.
DEPENDENT = {
    *("task.path", "task.hub", "task.train_file", "task.validation_file", "task.text_columns", "task.label_column"),
    *("task.labels", "task.problem_type", "task.delimiter", "task.validation_fraction", "task.no_answer_threshold"),
    *("task.source_column", "task.target_column", "task.source_prefix", "task.packing", "task.max_target_length"),
    *("task.generate", "task.max_new_tokens", "task.num_beams"),
    *("task.doc_stride", "task.n_best", "task.max_answer_length", "train.gradient_accumulation_steps"),
    *("schedule.first_blocks", "schedule.starts", "schedule.block_weights", "schedule.options"),
    *("schedule.frozen_mode", "cache.storage", "cache.dtype", "cache.budget_gigabytes", "cache.path"),
    *("method.options", "optimizer.options", "optimizer.name", "optimizer.warmup_steps", "engine.name", "engine.deepspeed"),
    *("engine.by_stage", "train.memory_gigabytes", "train.compile", "trackers.options"),
}


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A valid layer that sets some of the options; always a model, so that the demo's defaults stay away."""
    keys = draw(st.sets(st.sampled_from(sorted(VALID)))) | {"model.name"}
    tree: dict[str, Any] = {}
    for key in sorted(keys):
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = draw(VALID[key])
    if tree.get("optimizer", {}).get("lr_schedule") == "constant":
        tree["optimizer"].pop("final_lr_fraction", None)  # a constant curve has no end of its own
    return tree


def spoilt_values(field: FieldInfo) -> list[Any]:
    """Values of a wrong type, and values just outside the range, told from the schema."""
    kinds = set(accepts(field))
    found: list[Any] = [math.nan, math.inf, [[]]]
    found += [] if "object" in kinds else [{"x": 1}, {}]
    found += [] if "list" in kinds else [[1], []]
    found += [] if "string" in kinds else ["three", "1", ""]
    found += [] if "true or false" in kinds else [True]
    found += [] if "number" in kinds else [2.5]
    found += [] if kinds & {"number", "whole number"} else [3]
    found += [] if "null" in kinds else [None]
    for rule in field.metadata:
        for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
            if hasattr(rule, name):
                found.append(getattr(rule, name) + step)
    return found


LEAVES = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def load_fails(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([tree])
    named = [fault.key for fault in caught.value.faults]
    assert any(found == key or found.startswith(f"{key}.") for found in named), (key, str(caught.value))


@st.composite
def misspelt(draw: st.DrawFn, name: str) -> str:
    """A name after one or two edits of a letter; they may cancel out."""
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(name)))
        letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
        edit = draw(st.sampled_from(["insert", "delete", "replace"]))
        name = name[:place] + ("" if edit == "delete" else letter) + name[place + (edit != "insert") :]
    return name


def config_or_faults(paths: list[Any], overrides: list[str] | None = None) -> Config | None:
    """The config, or None where faults were reported; any other exception fails the test."""
    try:
        return load_config(paths, overrides or [])
    except ConfigError as error:
        faults = error.faults
    assert faults
    return None


@fuzz(trees())
def test_round_trip(tree: dict[str, Any]) -> None:
    config = load_config([tree])
    dumped = dump_config(config)
    assert load_config([json.loads(json.dumps(dumped))]) == config
    assert dump_config(load_config([dumped])) == dumped


@fuzz(trees(), st.sampled_from(LEAVES), st.data())
def test_a_spoilt_value_is_named(tree: dict[str, Any], key: str, data: st.DataObject) -> None:
    section, name = key.split(".")
    tree.setdefault(section, {})[name] = data.draw(st.sampled_from(spoilt_values(SECTIONS[section].model_fields[name])))
    load_fails(tree, key)


@fuzz(trees(), st.sampled_from(LEAVES), st.data())
def test_a_misspelt_key_is_named(tree: dict[str, Any], key: str, data: st.DataObject) -> None:
    section, name = key.split(".")
    spoilt = data.draw(misspelt(name))
    assume(spoilt not in SECTIONS[section].model_fields)
    tree.setdefault(section, {})[spoilt] = 1
    load_fails(tree, f"{section}.{spoilt}")


@fuzz(trees(), st.sampled_from(sorted(SECTIONS)).flatmap(misspelt), st.dictionaries(WORDS, JSON, max_size=2))
def test_a_misspelt_section_is_named(tree: dict[str, Any], section: str, values: dict[str, Any]) -> None:
    assume(section not in Config.model_fields)
    load_fails({**tree, section: values}, section)


@fuzz(trees(), st.sampled_from(sorted(SECTIONS)), JSON)
def test_any_json_in_any_place_gives_a_config_or_faults(tree: dict[str, Any], section: str, value: Any) -> None:
    for place in (tree, tree.setdefault(section, {}), {"engine": {"deepspeed": {}}}):
        spoilt = copy.deepcopy(tree)
        if place is tree:
            spoilt = value if isinstance(value, dict) else {section: value}
        elif place is tree[section]:
            spoilt[section] = value
        else:
            spoilt["engine"] = {"deepspeed": value}
        config_or_faults([spoilt])


DEEPSPEED_NAMES = st.sampled_from(
    [
        "optimizer",
        "scheduler",
        "params",
        "type",
        "enabled",
        "fp16",
        "bf16",
        "zero_optimization",
        "stage",
        "device",
        "offload_param",
    ]
    + ["offload_optimizer", "data_types", "lr", "warmup_num_steps", "train_batch_size", "gradient_clipping", "amp", "auto"]
)
DEEPSPEED = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats(0, 1) | DEEPSPEED_NAMES | st.just("AdamW") | st.just("WarmupLR"),
    lambda inner: st.dictionaries(DEEPSPEED_NAMES, inner, max_size=5) | st.lists(inner, max_size=2),
    max_leaves=20,
)


@fuzz(st.dictionaries(DEEPSPEED_NAMES, DEEPSPEED, max_size=6), st.booleans())
def test_any_deepspeed_block_gives_a_config_or_faults(block: dict[str, Any], bare: bool) -> None:
    config = config_or_faults([block if bare else {"engine": {"deepspeed": block}}])
    if config is not None:
        assert load_config([dump_config(config)]) == config


KEYS = st.lists(
    st.text(st.characters(exclude_characters=".=", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    min_size=1,
    max_size=4,
)


@fuzz(KEYS, JSON)
def test_set_round_trip(path: list[str], value: Any) -> None:
    # Blanks around the whole key are not part of it.
    path = [part.strip() for part in path]
    assert parse_set(format_set(path, value)) == (tuple(path), value)


@fuzz(st.text(max_size=40))
def test_any_text_as_set(text: str) -> None:
    config_or_faults([], [text])


@fuzz(st.binary(max_size=60))
def test_any_bytes_as_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    config_or_faults([path])


FILE_NAMES = [f"{letter}.json" for letter in "abcd"]
INCLUDES = st.lists(st.sampled_from([*FILE_NAMES, "../includes/a.json", "missing.json"]), max_size=3) | JSON


@fuzz(st.lists(INCLUDES, min_size=4, max_size=4))
def test_any_includes_give_a_config_or_faults(tmp_path_factory: pytest.TempPathFactory, includes: list[Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "includes"
    folder.mkdir(exist_ok=True)
    for name, included in zip(FILE_NAMES, includes, strict=True):
        (folder / name).write_text(json.dumps({"include": included, "model": {"name": name}}))
    config = config_or_faults([folder / "a.json"])
    if config is not None:
        assert config.model.name == "a.json"


def test_every_option_is_drawn_or_depends_on_others() -> None:
    assert not VALID.keys() & DEPENDENT
    assert VALID.keys() | DEPENDENT == {option.key for option in describe_schema()}
