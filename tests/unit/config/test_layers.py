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
        Train(epoch=3)


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
