"""Layers, `--set`, the dump, the hash and the help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from progscale.config import (
    Config,
    Train,
    config_hash,
    describe_schema,
    dump_config,
    format_set,
    load_config,
    micro_batch_size,
    parse_set,
)
from progscale.config.schema import SECTIONS
from progscale.errors import ConfigError


def write(path: Path, content: object) -> Path:
    """A JSON file, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def messages(paths: list, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides or [])
    return str(caught.value)


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    first = tmp_path / "a b ü.json"
    first.write_text(json.dumps({"optimizer": {"lr": 0.1, "betas": [0.1, 0.2]}, "model": {"overrides": {"a": {"x": 1, "y": 2}}}}))
    second = {"optimizer": {"betas": [0.3, 0.4]}, "model": {"overrides": {"a": {"y": 3}}}}
    config = load_config([str(first), second], ["train.epochs=5", "model.overrides.b=text"])
    assert (config.optimizer.lr, config.optimizer.betas) == (0.1, [0.3, 0.4])
    assert config.model.overrides == {"a": {"x": 1, "y": 3}, "b": "text"}
    assert config.train.epochs == 5
    assert load_config(first).optimizer.lr == 0.1


def test_null_takes_a_value_back() -> None:
    layers = [{"optimizer": {"warmup_fraction": 0.1}, "model": {"overrides": {"a": 1}}}]
    config = load_config(layers, ["optimizer.warmup_fraction=null", "optimizer.warmup_steps=5"])
    assert (config.optimizer.warmup_fraction, config.optimizer.warmup_steps) == (None, 5)


def test_includes_come_before_the_file_in_order_and_relative_to_it(tmp_path: Path) -> None:
    write(tmp_path / "models" / "m.json", {"optimizer": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1}, "run": {"seed": 1}})
    write(tmp_path / "t.json", {"optimizer": {"lr": 0.2, "eps": 0.2}, "task": {"max_train_examples": 5}})
    includes = ["../models/m.json", str(tmp_path / "t.json")]
    run = write(tmp_path / "runs" / "r.json", {"include": includes, "optimizer": {"lr": 0.3}, "description": "mine"})
    config = load_config([{"run": {"seed": 2}, "train": {"epochs": 9}}, run], ["optimizer.weight_decay=0.4"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (0.3, 0.2, 0.4)
    assert (config.run.seed, config.train.epochs, config.task.max_train_examples, config.description) == (1, 9, 5, "mine")
    # What comes after the file wins over all that it includes.
    assert load_config([run, {"run": {"seed": 3}, "optimizer": {"lr": 0.5}}]).run.seed == 3


def test_includes_include_and_a_shared_file_comes_once_before_all_that_build_on_it(tmp_path: Path) -> None:
    write(tmp_path / "base.json", {"optimizer": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1}})
    write(tmp_path / "sub" / "a.json", {"include": ["../base.json"], "optimizer": {"eps": 0.2}})
    write(tmp_path / "b.json", {"include": ["sub/../base.json"], "optimizer": {"weight_decay": 0.3}})
    run = write(tmp_path / "r.json", {"include": ["sub/a.json", "b.json"]})
    optimizer = load_config([run]).optimizer
    assert (optimizer.lr, optimizer.eps, optimizer.weight_decay) == (0.1, 0.2, 0.3)
    # Named as a layer of its own it is one, and wins by its place.
    assert load_config([run, tmp_path / "base.json"]).optimizer.eps == 0.1


def test_includes_without_anything_else_and_none_at_all(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"include": [], "train": {"epochs": 7}})
    assert load_config([write(tmp_path / "r.json", {"include": ["a.json"]})]).train.epochs == 7


def test_many_files_that_include_each_other_crosswise_are_read_once_each(tmp_path: Path) -> None:
    # Read anew each time, these would be 2^30 layers.
    write(tmp_path / "0.json", {"train": {"epochs": 7}})
    for level in range(1, 31):
        write(tmp_path / f"{level}.json", {"include": [f"{level - 1}.json", f"../{tmp_path.name}/{level - 1}.json"]})
    assert load_config(tmp_path / "30.json").train.epochs == 7


def test_messages_name_the_included_file(tmp_path: Path) -> None:
    write(tmp_path / "models" / "m.json", {"optimizer": {"lr": "fast"}, "tain": {}})
    write(tmp_path / "a.json", {"include": ["models/m.json"], "train": {"epoch": 1}})
    text = messages([write(tmp_path / "runs" / "r.json", {"include": ["../a.json"]})])
    assert f'optimizer.lr: "fast" (from {tmp_path}/models/m.json) must be a number' in text
    assert f"tain: unknown key (from {tmp_path}/models/m.json); did you mean 'train'?" in text
    assert f"train.epoch: unknown key (from {tmp_path}/a.json); did you mean 'epochs'?" in text


def test_an_included_deepspeed_file_is_a_layer_and_contradicts_as_one(tmp_path: Path) -> None:
    write(tmp_path / "ds.json", {"train_batch_size": 64, "zero_optimization": {"stage": 2}})
    config = load_config(write(tmp_path / "r.json", {"include": ["ds.json"], "run": {"seed": 1}}))
    assert config.train.global_batch_size == 64
    assert config.engine.deepspeed == {"zero_optimization": {"stage": 2}}
    run = write(tmp_path / "r.json", {"include": ["ds.json"], "train": {"global_batch_size": 32}})
    assert f"64 (from train_batch_size in {tmp_path}/ds.json) contradicts 32 (from {run}); keep one" in messages([run])
    assert load_config([run], ["train.global_batch_size=16"]).train.global_batch_size == 16
    # A bare DeepSpeed file may build on another.
    more = write(tmp_path / "more.json", {"include": ["ds.json"], "zero_optimization": {"stage": 3}})
    config = load_config(more)
    assert (config.train.global_batch_size, config.engine.deepspeed) == (64, {"zero_optimization": {"stage": 3}})


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_circle_of_includes_is_one_fault_that_shows_it(tmp_path: Path, depth: int) -> None:
    for index in range(depth):
        write(tmp_path / f"{index}.json", {"include": [f"{(index + 1) % depth}.json"]})
    first = write(tmp_path / "first.json", {"include": ["0.json"]})
    shown = " → ".join(f"{tmp_path}/{index % depth}.json" for index in range(depth + 1))
    assert messages([first]) == f"include: {shown}: a file cannot include itself (in {tmp_path}/{depth - 1}.json)"


def test_a_circle_through_a_link_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"include": ["link.json"]})
    (tmp_path / "link.json").symlink_to("a.json")
    assert "a file cannot include itself" in messages([tmp_path / "a.json"])


def test_dots_behind_a_linked_folder_are_the_file_systems(tmp_path: Path) -> None:
    write(tmp_path / "far" / "m.json", {"train": {"epochs": 7}})
    write(tmp_path / "far" / "runs" / "r.json", {"include": ["../m.json"]})
    (tmp_path / "runs").symlink_to(tmp_path / "far" / "runs")
    assert load_config(tmp_path / "runs" / "r.json").train.epochs == 7


def test_a_chain_of_files_without_end_is_a_fault(tmp_path: Path) -> None:
    for index in range(100):
        write(tmp_path / f"{index}.json", {"include": [f"{index + 1}.json"]})
    assert messages([tmp_path / "0.json"]) == f"include: more than 40 files include each other (in {tmp_path}/40.json)"


def test_a_missing_or_broken_include_names_both_files(tmp_path: Path) -> None:
    write(tmp_path / "bert-base.json", {})
    (tmp_path / "broken.json").write_text('{"train": {')
    (tmp_path / "list.json").write_text("[1]")
    names = ["bert-bas.json", "broken.json", "list.json", ".", "a\0b", "x" * 5000]
    run = write(tmp_path / "r.json", {"include": names, "train": {"epoch": 1}})
    text = messages([run])
    assert text.startswith("7 faults")
    assert text.count(f"(included by {run})") == 6
    assert f"{tmp_path}/bert-bas.json: no such file; did you mean 'bert-base.json'? (included by {run})" in text
    assert f"{tmp_path}/broken.json, line 1, column 12: not JSON" in text
    assert f"{tmp_path}/list.json: an array at the top; a layer is a JSON object" in text
    assert f"{tmp_path}: is a folder; name a JSON file in it (included by {run})" in text
    assert "not a file name" in text
    assert "cannot be read" in text
    assert "train.epoch: unknown key" in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a.json", r'include: "a\.json" \(from .*r\.json\) must be a list of JSON files, e\.g\. \["a\.json"\]$'),
        (None, r"include: null \(from .*r\.json\) must be a list of JSON files, e\.g\. \[\"\.\./models/bert-base\.json\"\]$"),
        ({"a": "a.json"}, r"include: \{.*must be a list"),
        (["a.json", 3], r'include: \["a\.json", 3\] .*must be a list'),
        (["a.json", ""], r"include: .*must be a list"),
        ([["a.json"]], r"include: .*must be a list"),
        (True, r"include: true .*must be a list"),
    ],
)
def test_include_of_a_wrong_type(tmp_path: Path, value: object, message: str) -> None:
    write(tmp_path / "a.json", {})
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path / "r.json", {"include": value}))
    assert len(caught.value.faults) == 1


def test_includes_stand_at_the_top_of_files_alone(tmp_path: Path) -> None:
    assert messages([{"include": ["a.json"]}]) == (
        "include: only a file can include others (from a mapping); give those before it, as layers"
    )
    for text in ("include=a.json", 'include=["a.json"]', "include.0=a.json"):
        assert messages([], [text]) == "include: only a file can include others (from --set); give them with --config FILE"
    assert "train.include: unknown key (from a mapping); it stands at the top of a file" in messages([{"train": {"include": []}}])
    assert "includes: unknown key (from a mapping); did you mean 'include'?" in messages([{"includes": []}])
    (tmp_path / "r.json").write_text('{"include": [], "include": ["a.json"]}')
    write(tmp_path / "a.json", {})
    assert messages([tmp_path / "r.json"]) == f"include: given twice (in {tmp_path / 'r.json'}); keep one"


def test_set_takes_json_or_text() -> None:
    config = load_config(
        [], ['optimizer={"lr": 1, "eps": 1e-6}', "optimizer.betas=[0.5, 0.6]", "run.name=x=y", "model.random_weights=true"]
    )
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.betas) == (1, 1e-6, [0.5, 0.6])
    assert config.run.name == "x=y"
    assert config.model.random_weights is True


def test_parse_set() -> None:
    assert parse_set("train.epochs=3") == (("train", "epochs"), 3)
    assert parse_set("a.b=[1, 2") == (("a", "b"), "[1, 2")
    assert parse_set(format_set(("a", "b"), "3")) == (("a", "b"), "3")
    with pytest.raises(ConfigError, match="no '='"):
        parse_set("train.epochs")


def test_dump_writes_every_option_and_loads_again() -> None:
    config = load_config([{"train": {"epochs": 7}}])
    dumped = json.loads(json.dumps(dump_config(config)))
    assert load_config([dumped]) == config
    assert set(dumped) == set(Config.model_fields)
    assert all(set(dumped[name]) == set(section.model_fields) for name, section in SECTIONS.items())


def test_hash_leaves_out_names_and_folders() -> None:
    base = config_hash(load_config())
    assert config_hash(load_config([{"description": "x"}], ["run.name=a", "run.output_dir=b"])) == base
    assert config_hash(load_config([], ["checkpoint.every_steps=10"])) == base
    assert config_hash(load_config([], ["run.seed=43"])) != base
    assert config_hash(load_config([], ["train.epochs=3"])) == base
    assert config_hash(load_config([dump_config(load_config())])) == base


def test_demo_defaults_hold_for_the_demo_alone() -> None:
    assert (load_config().optimizer.lr, load_config().train.max_length) == (5e-4, 64)
    assert load_config([], ["optimizer.lr=0.5"]).optimizer.lr == 0.5
    config = load_config([], ["model.name=m", "task.name=cola"])
    assert (config.optimizer.lr, config.train.max_length) == (2e-5, 128)


def test_derived_values() -> None:
    config = load_config([], ["model.name=m", "task.name=cola", "schedule.name=growing", "run.seed=7"])
    assert config.run_name == "cola-growing-7"
    assert config.stages == 3
    assert load_config([], ["run.name=mine"]).run_name == "mine"


def test_config_is_frozen_and_strict_in_python_too() -> None:
    config = Config(train=Train(epochs=2))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 3
    with pytest.raises(ValidationError, match="epoch"):
        Train(**{"epoch": 3})


def test_describe_schema_has_every_option_with_one_line() -> None:
    options = describe_schema()
    assert len({option.key for option in options}) == len(options)
    assert {option.key.partition(".")[0] for option in options} == set(Config.model_fields)
    for option in options:
        assert option.description, option.key
        assert "\n" not in option.description
        assert len(option.description) <= 120, option.key
    table = {option.key: option for option in options}
    assert table["optimizer.lr"].type == "number"
    assert table["train.max_steps"].type == "whole number or null"
    assert table["engine.name"].type == '"auto" or "plain" or "ddp" or "deepspeed"'
    assert table["task.no_answer_threshold"].type == 'number or "auto"'
    assert table["optimizer.betas"].default == [0.9, 0.999]


def test_micro_batch_size() -> None:
    def size(world_size: int, **train: int) -> int:
        return micro_batch_size(load_config([{"train": train}]), world_size)

    assert size(1) == 32
    assert size(2) == 16
    assert size(1, global_batch_size=256) == 32
    assert size(4, global_batch_size=256, micro_batch_size=8) == 8
    assert size(2, global_batch_size=32, micro_batch_size=32) == 16
    assert size(2, global_batch_size=64, gradient_accumulation_steps=4) == 8
    assert size(2, global_batch_size=64, gradient_accumulation_steps=4, micro_batch_size=8) == 8
    with pytest.raises(ConfigError, match=r"global_batch_size: 32 rows .* by 3 processes; use 30 or 33"):
        size(3)
    with pytest.raises(ConfigError, match=r"by 64 processes; use 64"):
        size(64)
    with pytest.raises(ConfigError, match=r"on 4 processes are 16 each, not 4 micro-batches of 8 rows"):
        size(4, global_batch_size=64, gradient_accumulation_steps=4, micro_batch_size=8)


def test_no_heavy_import_and_fast(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"train": {"epochs": "three"}}')
    program = f"""
import sys, time
start = time.perf_counter()
import progscale.config as config
from progscale.errors import ConfigError
config.load_config()
try:
    config.load_config([{str(path)!r}])
except ConfigError as error:
    assert "train.epochs" in str(error)
heavy = {{"torch", "transformers", "datasets", "accelerate", "deepspeed", "numpy"}} & set(sys.modules)
assert not heavy, heavy
ours = {{name for name in sys.modules if name.startswith("progscale.")}}
others = {{name for name in ours if not name.startswith(("progscale.config", "progscale.errors"))}}
assert not others, others
print(time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2
