"""Every mistake a user can make in a config ends in one ConfigError that says what, where and what is allowed."""

import json
from pathlib import Path

import pytest

from progscale.config import Config, load_config
from progscale.errors import ConfigError


def messages(paths=(), overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "my.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


TEXTS = [
    pytest.param("", r"my\.json: the file is empty", id="empty"),
    pytest.param("  \n", r"my\.json: the file is empty", id="blank"),
    pytest.param('{"train": {"epochs": 3,}}', r"my\.json, line 1, column \d+: not JSON", id="trailing comma"),
    pytest.param('{\n "train": {\n  epochs: 3}}', r"my\.json, line 3, column 3: not JSON", id="no quotes"),
    pytest.param("{'train': 1}", r"line 1, column 2: not JSON", id="single quotes"),
    pytest.param('{"train": {}} x', r"line 1, column 15: not JSON: Extra data", id="more behind"),
    pytest.param("[1, 2]", r"my\.json: an array at the top", id="array"),
    pytest.param("3", r"my\.json: a number at the top", id="number"),
    pytest.param("null", r"my\.json: null at the top", id="null"),
    pytest.param('"train"', r"my\.json: a string at the top", id="string"),
    pytest.param("true", r"my\.json: a boolean at the top", id="boolean"),
    pytest.param(b'{"run": {"name": "\xff"}}', r"my\.json: not UTF-8 text \(byte 18\)", id="not UTF-8"),
    pytest.param('{"train": {"epochs": 1, "epochs": 2}}', r"train\.epochs: given twice \(in .*my\.json\)", id="duplicate key"),
    pytest.param('{"train": {}, "train": {}}', r"train: given twice", id="duplicate section"),
    pytest.param('{"optimizer": {"lr": NaN}}', r"optimizer\.lr: NaN \(from .*my\.json\) must be a finite number", id="NaN"),
    pytest.param('{"optimizer": {"lr": -Infinity}}', r"optimizer\.lr: -Infinity .*finite", id="infinity"),
    pytest.param('{"optimizer": {"lr": 1e999}}', r"optimizer\.lr: Infinity .*finite", id="overflow"),
    pytest.param('{"optimizer": {"betas": [0.9, NaN]}}', r"optimizer\.betas\.1: NaN .*finite", id="NaN in a list"),
    pytest.param('{"model": {"overrides": {"a": {"b": NaN}}}}', r"model\.overrides\.a\.b: NaN", id="NaN in a free object"),
    pytest.param('{"run": {"seed": ' + "9" * 5000 + "}}", r"a number is too long", id="number of 5000 digits"),
    pytest.param("[" * 100_000, r"not usable JSON|nesting", id="100000 brackets"),
    pytest.param(
        '{"model": {"overrides": ' + '{"a":' * 100 + "1" + "}" * 100 + "}}", r"model\.overrides\.a: nested more", id="deep"
    ),
]


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_text_of_a_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([written(tmp_path, text)])


def test_byte_order_mark_is_harmless(tmp_path: Path) -> None:
    assert load_config([written(tmp_path, b'\xef\xbb\xbf{"train": {"epochs": 2}}')]).train.epochs == 2


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "zero2.json").write_text("{}")
    assert "did you mean 'zero2.json'?" in messages([tmp_path / "zer2.json"])
    assert "holds zero2.json" in messages([tmp_path / "other"])
    assert "there is no folder" in messages([tmp_path / "no" / "zero2.json"])


def test_folder_and_impossible_names(tmp_path: Path) -> None:
    assert "is a folder; name a JSON file in it" in messages([tmp_path])
    assert "not a file name" in messages(["a\0b.json"])
    assert "cannot be read" in messages(["x" * 5000])


VALUES = [
    ({"train": {"epochs": "three"}}, r'train\.epochs: "three" \(from a mapping\) must be a number$'),
    ({"train": {"global_batch_size": "32"}}, r'"32" .*must be a whole number; write it without quotes'),
    ({"train": {"global_batch_size": 2.5}}, r"train\.global_batch_size: 2\.5 .*must be a whole number"),
    ({"optimizer": {"lr": "1e-3"}}, r'optimizer\.lr: "1e-3" .*must be a number; write it without quotes'),
    ({"train": {"logging_steps": True}}, r"train\.logging_steps: true .*must be a whole number"),
    ({"train": {"epochs": True}}, r"train\.epochs: true .*must be a number"),
    ({"train": {"group_by_length": 1}}, r"train\.group_by_length: 1 .*must be true or false"),
    ({"train": {"global_batch_size": None}}, r"train\.global_batch_size: null .*must be a whole number"),
    ({"optimizer": {"lr": None}}, r"optimizer\.lr: null .*must be a number"),
    ({"optimizer": {"lr": -0.1}}, r"optimizer\.lr: -0\.1 \(from a mapping\) must be above 0$"),
    ({"optimizer": {"lr": 0}}, r"optimizer\.lr: 0 .*must be above 0"),
    ({"optimizer": {"lr": 10**400}}, r"optimizer\.lr: 1000.* must be a number"),
    ({"train": {"epochs": 0}}, r"train\.epochs: 0 .*must be above 0"),
    ({"train": {"epochs": -3}}, r"train\.epochs: -3 .*must be above 0"),
    ({"train": {"global_batch_size": 0}}, r"must be at least 1"),
    ({"train": {"global_batch_size": 10**20}}, r"must be at most 1000000000000"),
    ({"train": {"num_workers": -1}}, r"train\.num_workers: -1 .*must be at least 0"),
    ({"train": {"max_grad_norm": 0}}, r"train\.max_grad_norm: 0 .*must be above 0, or null"),
    ({"train": {"max_steps": 0}}, r"train\.max_steps: 0 .*must be at least 1, or null"),
    ({"run": {"seed": -1}}, r"run\.seed: -1 .*must be at least 0"),
    ({"run": {"seed": 2**32}}, r"run\.seed: 4294967296 .*must be at most 4294967295"),
    ({"run": {"name": "a/b"}}, r"run\.name: \"a/b\" .*one folder name"),
    ({"run": {"name": ".."}}, r"run\.name"),
    ({"run": {"name": "x" * 201}}, r"run\.name"),
    ({"run": {"name": ""}}, r"run\.name: \"\" .*must not be empty"),
    ({"schedule": {"stages": 0}}, r"schedule\.stages: 0 .*must be at least 1"),
    ({"schedule": {"stages": -2}}, r"schedule\.stages: -2"),
    ({"schedule": {"stages": 2.5}}, r"schedule\.stages: 2\.5 .*must be a whole number, or null"),
    ({"schedule": {"embeddings": "sometimes"}}, r"must be one of 'always', 'first_stage', 'never'"),
    ({"schedule": {"embeddings": "first_stge"}}, r"did you mean 'first_stage'\?"),
    ({"train": {"precision": "bf61"}}, r"train\.precision: \"bf61\" .*'bf16_params', 'fp16'; did you mean 'bf16'\?"),
    ({"train": {"precision": 16}}, r"train\.precision: 16 .*must be one of 'fp32'"),
    ({"train": {"nonfinite": "skip:0"}}, r"train\.nonfinite: \"skip:0\" .*'stop' or 'skip:N'"),
    ({"train": {"nonfinite": "skip:²"}}, r"train\.nonfinite"),
    ({"optimizer": {"betas": [0.9]}}, r"optimizer\.betas: \[0\.9\] .*at least 2 entries"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer\.betas\.1: 1\.0 .*must be below 1"),
    ({"optimizer": {"betas": 0.9}}, r"optimizer\.betas: 0\.9 .*must be a list"),
    ({"schedule": {"first_blocks": [0, -1]}}, r"schedule\.first_blocks\.1: -1 .*must be at least 0"),
    ({"schedule": {"first_blocks": 3}}, r"schedule\.first_blocks: 3 .*must be a list"),
    ({"schedule": {"first_blocks": {}}}, r"schedule\.first_blocks: \{\} .*must have at least 1 entries"),
    ({"schedule": {"first_blocks": {"decoder": [0, -1]}}}, r"schedule\.first_blocks\.decoder\.1: -1 .*must be at least 0"),
    ({"schedule": {"first_blocks": {"decoder": 3}}}, r"schedule\.first_blocks\.decoder: 3 .*must be a list"),
    ({"task": {"num_beams": 0}}, r"task\.num_beams: 0 .*must be at least 1"),
    ({"schedule": {"block_weights": [1, 0]}}, r"schedule\.block_weights\.1: 0 .*must be above 0"),
    ({"task": {"no_answer_threshold": "never"}}, r"task\.no_answer_threshold: \"never\" .*must be a number or 'auto'"),
    ({"task": {"text_columns": ["a", "b", "c"]}}, r"task\.text_columns: .*at most 2 entries"),
    ({"task": {"delimiter": "::"}}, r"task\.delimiter: .*at most 1 characters"),
    ({"task": {"validation_fraction": 1.0}}, r"task\.validation_fraction: 1\.0 .*must be below 1"),
    ({"model": {"overrides": [1]}}, r"model\.overrides: \[1\] .*must be an object"),
    ({"model": {"overrides": {1: 2}}}, r"model\.overrides: 1 .*is not a string"),
    ({"engine": {"deepspeed": "zero2.json"}}, r"engine\.deepspeed: \"zero2\.json\" .*must be an object, or null"),
    ({"description": 3}, r"description: 3 .*must be a string, or null"),
    ({"train": 3}, r"train: 3 \(from a mapping\) must be an object"),
    ({"train": None}, r"train: null .*must be an object"),
    ({"optimizer": [1]}, r"optimizer: \[1\] .*must be an object"),
]


@pytest.mark.parametrize(("layer", "message"), VALUES)
def test_values(layer: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([layer])


KEYS = [
    ({"trian": {}}, r"trian: unknown key \(from a mapping\); did you mean 'train'\?"),
    ({"hash": {}}, r"hash: unknown key .*; sections: description, run, model"),
    ({"xyz": {}}, r"xyz: unknown key .*; sections: description, run, model"),
    ({"train": {"epoch": 3}}, r"train\.epoch: unknown key .*did you mean 'epochs'\?"),
    ({"train": {"zzz": 3}}, r"train\.zzz: unknown key .*; keys: epochs"),
    ({"train": {"lr": 1}}, r"train\.lr: unknown key .*'lr' belongs to optimizer\.lr"),
    ({"train": {"warmup_steps": 1}}, r"'warmup_steps' belongs to optimizer\.warmup_steps"),
    ({"lr": 1}, r"lr: unknown key .*'lr' belongs to optimizer\.lr"),
    ({"name": "x"}, r"name: unknown key .*'name' belongs to run\.name or model\.name"),
    ({"train": {"fp16": {}}}, r"train\.fp16: unknown key .*put it under engine\.deepspeed"),
    ({"model": {"trust_remote_code": True}}, r"model\.trust_remote_code: unknown key"),
    ({"model": {"allow_pickle": True}}, r"model\.allow_pickle: unknown key"),
]


@pytest.mark.parametrize(("layer", "message"), KEYS)
def test_unknown_keys(layer: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([layer])


SETS = [
    ("optimizer.lr", r"--set optimizer\.lr: no '='; write --set section\.key=value"),
    ("=3", r"an empty key"),
    ("optimizer.=3", r"an empty key"),
    (".lr=3", r"an empty key"),
    ("optimzer.lr=3", r"optimzer: unknown key \(from --set\); did you mean 'optimizer'\?"),
    ("optimizer.lrr=3", r"optimizer\.lrr: unknown key .*did you mean 'lr'\?"),
    ("lr=3", r"'lr' belongs to optimizer\.lr"),
    ("optimizer=3", r"optimizer: 3 \(from --set\) must be an object"),
    ("optimizer.lr=abc", r'optimizer\.lr: "abc" \(from --set\) must be a number'),
    ("optimizer.lr=", r'optimizer\.lr: "" \(from --set\) must be a number'),
    ("optimizer.lr=NaN", r"optimizer\.lr: NaN \(from --set\) must be a finite number"),
    ("optimizer.lr=-Infinity", r"must be a finite number"),
    ("train.epochs=three", r"train\.epochs: \"three\""),
    ("run.name=5", r"run\.name: 5 .*quote it twice to keep it a string: '\"5\"'"),
    ("optimizer.betas.0=1", r"optimizer\.betas: lists are set whole \(from --set\), e\.g\. --set 'optimizer\.betas="),
    ("optimizer.lr.x=1", r"optimizer\.lr: has no keys of its own .*--set optimizer\.lr="),
    ("train.group_by_length=yes", r"train\.group_by_length: \"yes\" .*must be true or false"),
    ('optimizer={"lr": 1, "lr": 2}', r"optimizer\.lr: given twice"),
    ("run.seed=" + "9" * 5000, r"run\.seed: not usable JSON"),
    ("run.seed=" + "[" * 100_000, r"run\.seed: (not usable JSON|.*must be a whole number)"),
    (".".join("a" * 60) + "=1", r"nested more than"),
]


@pytest.mark.parametrize(("text", "message"), SETS)
def test_set(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], [text])


def test_set_into_a_list_of_a_free_object() -> None:
    layer = {"model": {"overrides": {"sizes": [1, 2]}}}
    with pytest.raises(ConfigError, match=r"model\.overrides\.sizes: lists are set whole"):
        load_config([layer], ["model.overrides.sizes.0=1"])


def model(**others: dict) -> dict:
    return {"model": {"name": "m"}, **others}


LM: dict[str, dict[str, object]] = {"train": {"max_length": 512}}
COLUMNS = {"source_column": "a", "target_column": "b"}
PAIRS: dict[str, object] = {"name": "causal_lm", "train_file": "f", **COLUMNS}
CROSS = [
    (
        {"optimizer": {"warmup_steps": 5, "warmup_fraction": 0.1}},
        r"optimizer\.warmup_steps: 5 .*is given together with optimizer\.warmup_fraction = 0\.1 \(from a mapping\)",
    ),
    ({"schedule": {"name": "custom"}}, r"schedule\.first_blocks: missing; schedule 'custom' needs one first block"),
    ({"schedule": {"first_blocks": [0, 1, 2]}}, r"only schedule 'custom' uses it, not schedule\.name = \"progtuning\""),
    ({"schedule": {"name": "weighted"}}, r"schedule\.block_weights: missing; schedule 'weighted' needs"),
    ({"schedule": {"block_weights": [1.0]}}, r"only schedule 'weighted' uses it"),
    ({"schedule": {"options": {"a": 1}}}, r"schedule\.options: no options for schedule\.name = \"progtuning\""),
    ({"schedule": {"stages": 2, "starts": [0, 5, 9]}}, r"schedule\.starts: 3 entries .*for 2 stages; give one for each"),
    ({"schedule": {"name": "custom", "stages": 2, "first_blocks": [0]}}, r"first_blocks: 1 entries .*for 2 stages"),
    (
        {"schedule": {"name": "custom", "stages": 2, "first_blocks": {"encoder": [0, 1], "decoder": [0]}}},
        r"schedule\.first_blocks\.decoder: 1 entries .*for 2 stages",
    ),
    (
        {"cache": {"storage": "ram"}, "schedule": {"frozen_mode": "train"}},
        r"schedule\.frozen_mode: \"train\" .*beside cache\.storage = \"ram\" .*take eval, or switch the cache off",
    ),
    ({"cache": {"storage": "ram"}, "schedule": {"name": "growing"}}, r"cache\.storage: \"ram\" .*trains blocks that were frozen"),
    ({"cache": {"storage": "ram", "path": "/tmp"}}, r"cache\.path: \"/tmp\" .*is for disk, not cache\.storage = \"ram\""),
    ({"train": {"memory_gigabytes": 4.0}}, r"train\.memory_gigabytes: 4\.0 .*is for train\.micro_batch_size = \"auto\""),
    (
        {"train": {"micro_batch_size": "auto", "gradient_accumulation_steps": 4}},
        r"train\.gradient_accumulation_steps: 4 .*beside train\.micro_batch_size = \"auto\" .*, which finds how many",
    ),
    ({"cache": {"dtype": "bf16"}}, r"cache\.dtype: \"bf16\" .*is not used with cache\.storage = \"off\""),
    ({"cache": {"budget_gigabytes": 1.5}}, r"cache\.budget_gigabytes: 1\.5 .*is not used"),
    (LM | {"task": {"name": "causal_lm"}}, r"task\.train_file: missing; task 'causal_lm' needs your data"),
    ({"task": {"name": "causal_lm", "train_file": "a", "label_column": "b"}}, r"task\.label_column: only task 'table' uses it"),
    ({"task": {"name": "causal_lm", "train_file": "a", "n_best": 3}}, r"task\.n_best: only squad tasks use it"),
    ({"task": {"name": "mrpc", "generate": True}}, r"task\.generate: only causal_lm and summarization use it, not"),
    (
        {"task": {"name": "causal_lm", "train_file": "a", "source_column": "b"}},
        r'task\.target_column: missing; task\.source_column = "b" .*needs it',
    ),
    (
        {"task": {"name": "summarization", "train_file": "a"}},
        r'task\.source_column: missing; task\.name = "summarization" .*needs it',
    ),
    ({"task": {"name": "causal_lm", "train_file": "a", "generate": True}}, r"task\.generate: is for prompts with completions"),
    ({"task": {"name": "causal_lm", "train_file": "a", "num_beams": 2}}, r"task\.num_beams: is for written texts"),
    ({"task": {"name": "causal_lm", "train_file": "a", "text_columns": ["a", "b"]}}, r"task\.text_columns: .*takes one column"),
    (LM | {"task": PAIRS | {"text_columns": ["c"]}}, r"task\.text_columns: given beside task\.source_column"),
    (LM | {"task": PAIRS | {"packing": True}}, r"task\.packing: is for whole texts"),
    (LM | {"task": PAIRS | {"target_column": "a"}}, r'task\.target_column: "a" .*is task\.source_column too'),
    (LM | {"task": PAIRS, "train": {"max_length": 100}}, r"task\.max_target_length: 128 must be below train\.max_length = 100"),
    (
        {"task": {"name": "summarization", **COLUMNS, "train_file": "f", "generate": False, "max_new_tokens": 3}},
        r"task\.max_new_tokens: is for written texts",
    ),
    ({"schedule": {"name": "custom", "first_blocks": [0, 1], "starts": [0]}}, r"starts: 1 entries .*for 2 stages"),
    ({"schedule": {"starts": [1, 5]}}, r"must ascend from 0"),
    ({"schedule": {"starts": [0, 5, 5]}}, r"must ascend from 0"),
    ({"train": {"precision": "bf16_params"}}, r"train\.precision: \"bf16_params\" .*needs engine\.deepspeed"),
    (
        {"train": {"micro_batch_size": 64, "global_batch_size": 32}},
        r"train\.micro_batch_size: 64 .*is above train\.global_batch_size = 32",
    ),
    (
        {"train": {"micro_batch_size": 3, "gradient_accumulation_steps": 2, "global_batch_size": 32}},
        r"train\.global_batch_size: 32 .*is not a multiple of train\.micro_batch_size = 3 .* × ",
    ),
    (
        {"engine": {"name": "ddp", "deepspeed": {"zero_optimization": {"stage": 1}}}},
        r"engine\.name: \"ddp\" .*while engine\.deepspeed is given",
    ),
    ({"engine": {"name": "plain", "deepspeed": {"zero_optimization": {"stage": 1}}}}, r"engine\.name: \"plain\""),
    ({"engine": {"name": "deepspeed"}}, r"engine\.deepspeed: missing"),
    ({"task": {"name": "cola"}}, r"model\.name: missing; task\.name = \"cola\" .*needs a model"),
    ({"task": {"text_columns": ["x"]}}, r"task\.text_columns: only task 'table' uses it, not task\.name = \"demo\""),
    ({"task": {"train_file": "x.csv"}}, r"task\.train_file: task\.name = \"demo\" makes its own data"),
    ({"task": {"path": "x"}}, r"task\.path: task\.name = \"demo\" makes its own data"),
    (model(task={"name": "mrpc", "path": "x", "hub": "y/z"}), r"task\.hub: \"y/z\" .*names the data, and so does task\.path"),
    (
        model(task={"name": "mrpc", "train_file": "part.tsv"}),
        r"task\.path: missing; task\.train_file names a file in that folder",
    ),
    ({"task": {"n_best": 5}}, r"task\.n_best: only squad tasks use it"),
    (model(task={"name": "squad-v1"}), r"task\.doc_stride: 128 must be below train\.max_length = 128"),
    (model(task={"name": "table"}), r"task\.train_file: missing; task 'table' needs your data"),
    (model(task={"name": "table", "train_file": "a", "hub": "b"}), r"task\.hub and task\.train_file both name the data"),
    (
        model(task={"name": "table", "train_file": "a", "validation_file": "b", "validation_fraction": 0.1}),
        r"task\.validation_fraction: not used beside task\.validation_file",
    ),
    (
        model(task={"name": "table", "train_file": "a", "problem_type": "regression", "labels": ["a", "b"]}),
        r"task\.labels: names of classes for a regression",
    ),
    (model(task={"name": "table", "train_file": "a", "labels": ["a", "a"]}), r"names a class twice"),
    (model(task={"name": "table", "train_file": "a", "text_columns": ["a", "a"]}), r"names a column twice"),
    (
        model(task={"name": "table", "train_file": "a", "text_columns": ["a"], "label_column": "a"}),
        r"task\.label_column: \"a\" .*is one of task\.text_columns",
    ),
]


@pytest.mark.parametrize(("layer", "message"), CROSS)
def test_impossible_combinations(layer: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([layer])


def test_all_faults_of_all_layers_at_once(tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    one.write_text(json.dumps({"trian": {}, "optimizer": {"lr": -1, "warmup_steps": 1}, "train": {"epochs": "x"}}))
    two = tmp_path / "two.json"
    two.write_text("[")
    text = messages([one, two], ["optimizer.warmup_fraction=0.1", "task.name=cola", "nothing", "engine.name=dpp"])
    for part in (
        "8 faults",
        "trian: unknown key",
        "optimizer.lr: -1",
        "train.epochs",
        "two.json, line 1",
        "is given together with optimizer.warmup_fraction",
        "model.name: missing",
        "--set nothing: no '='",
        "engine.name: \"dpp\" (from --set) must be one of 'auto', 'plain', 'ddp', 'deepspeed'; did you mean 'ddp'?",
    ):
        assert part in text
    assert str(one) in text


def test_a_wrong_value_brings_no_second_fault_with_it() -> None:
    text = messages([{"optimizer": {"warmup_steps": -1, "warmup_fraction": 0.1}}])
    assert "together" not in text
    assert "optimizer.warmup_steps: -1" in text


def test_a_later_layer_mends_an_earlier_fault() -> None:
    assert load_config([{"optimizer": {"lr": -1}}], ["optimizer.lr=0.1"]).optimizer.lr == 0.1


def test_what_is_not_a_fault() -> None:
    config = load_config([{"schedule": {"name": "somebody-elses", "stages": 40, "options": {"a": 1}}, "task": {"name": "demo"}}])
    assert isinstance(config, Config)
    assert load_config([{"train": {"epochs": 0.5}}]).stages == 1
    assert load_config([{"train": {"epochs": 2.5}}]).stages == 3
    assert load_config([{"schedule": {"name": "custom", "first_blocks": [0, 3]}}]).stages == 2
    by_stack = {"encoder": [0, 3, 4], "decoder": [0, 1, 2]}
    assert load_config([{"schedule": {"name": "custom", "first_blocks": by_stack}}]).stages == 3
