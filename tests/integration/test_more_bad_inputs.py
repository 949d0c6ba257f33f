"""Mistakes that reach further than the config: paths, values that only a model or the data contradict, launchers' variables."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from progscale.config import load_config, micro_batch_size
from progscale.errors import ConfigError
from progscale.joining import check_same_on_all_ranks
from progscale.tasks.files import Table
from progscale.trackers import RunFolder
from tests.harness.programs import REPOSITORY, Answer, in_process, settings
from tests.harness.tables import OWN_TABLE, write_table
from tests.tiny import tiny_model

SHORT = {"train__max_steps": 1, "schedule__stages": 1, "task__max_eval_examples": 8, "train__save_model": "none"}
LONG = "x" * 300
pytestmark = pytest.mark.usefixtures("empty_folder")


def refused(answer: Answer, message: str) -> None:
    assert answer.code == 2, answer.err
    # Warnings may stand before it.
    *_, said = answer.err.splitlines()
    assert said.startswith("progscale: ")
    assert message in said
    assert len(said) < 2000 and "Traceback" not in answer.err


# -- config: before torch --------------------------------------------------------------------------------------------

VALUES: list[tuple[dict[str, Any], str]] = [
    ({"run__output_dir": "~no-such-user/runs"}, "names no user's home; write './~…'"),
    ({"run__output_dir": "a\0b"}, "must be a folder's path: no NUL"),
    ({"run__output_dir": f"runs/{LONG}"}, "255 between two slashes"),
    ({"run__output_dir": "a/" * 1600}, "at most 3000 bytes"),
    ({"run__output_dir": "x" * 5000}, "run.output_dir: "),
    ({"run__output_dir": "a\ud800"}, "must be valid Unicode"),
    ({"run__name": "é" * 101}, "must be one folder name: no slash, not '..', at most 200 bytes"),
    ({"run__name": "a\ud800"}, "must be valid Unicode"),
    ({"run__threads": 10**12}, "run.threads: 1000000000000 (from --set) must be at most 4096"),
    ({"model__name": "x" * 5000}, "must be at most 4096 characters"),
    (
        {"train__epochs": 20_000, "schedule__stages": ...},
        "schedule.stages: not given, and train.epochs = 20000.0 (from --set) would make 20000; at most 10000 are possible",
    ),
    (
        {"schedule__stages": ..., "schedule__starts": list(range(10_001))},
        "schedule.stages: not given, and schedule.starts (from --set) would make 10001; at most 10000 are possible",
    ),
]


@pytest.mark.parametrize(("change", "message"), VALUES, ids=range(len(VALUES)))
def test_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(in_process("train", *settings(**change)), message)
    refused(in_process("doctor", *settings(**change)), message)
    assert list(tmp_path.iterdir()) == []


def test_many_epochs_in_few_stages_are_no_mistake() -> None:
    assert load_config([], ["train.epochs=1000000", "schedule.stages=3"]).stages == 3


# -- paths -----------------------------------------------------------------------------------------------------------


def short_run(output: str, name: str = "a", *flags: str) -> Answer:
    return in_process("train", *flags, *settings(**SHORT, run__output_dir=output, run__name=name))


def test_home_is_meant_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_config([], ["run.output_dir=~"]).run.output_dir == str(tmp_path / "home")
    answer = short_run("~/my runs")
    assert answer.code == 0, answer.err
    assert (tmp_path / "home" / "my runs" / "a" / "summary.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_folder_above_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    answer = short_run("../beside/../runs", "ü" * 100)
    assert answer.code == 0, answer.err
    assert (tmp_path / "runs" / ("ü" * 100) / "summary.json").exists()
    assert list((tmp_path / "here").iterdir()) == []


def test_links(tmp_path: Path) -> None:
    """A linked folder is used as any other, and moved aside as a link; one that leads nowhere or in a circle is told."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        RunFolder(Path("runs/a"), {}, "hash").close()
    assert (tmp_path / "runs" / "a.1").is_symlink() and not (tmp_path / "runs" / "a").is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").exists()
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "nowhere")
    (tmp_path / "runs" / "c").symlink_to(tmp_path / "runs" / "c")
    for name in ("b", "c"):
        for policy in ("never", "auto"):
            refused(short_run("runs", name, "--resume", policy), f"run.output_dir: 'runs/{name}' cannot be written (")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    make = Path.mkdir

    def fail(self: Path, *arguments: Any, **named: Any) -> None:
        if self == Path("runs/a"):
            raise OSError(code, os.strerror(code), str(self))
        make(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", fail)
    refused(short_run("runs"), f"'runs/a' cannot be written ({os.strerror(code)}); choose another with --set run.output_dir=…")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that takes no folders")
def test_a_file_system_that_takes_no_folders() -> None:
    refused(short_run("/proc/runs"), "run.output_dir: '/proc/runs/a' cannot be written (")


@pytest.mark.parametrize("content", ["", "[]", "3", "[" * 100_000, '{"hash": 3}'], ids=lambda text: text[:5])
def test_a_folder_with_somebody_elses_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.json").write_text(content)
    refused(short_run("runs"), "choose another with --set run.name=…")
    assert (tmp_path / "runs" / "a" / "config.json").read_text() == content


# -- data and model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and a table."""
    folder = tmp_path_factory.mktemp("right")
    write_table(folder, tiny_model("bert", blocks=3))
    return folder


@pytest.fixture
def own(right: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on a copy of that folder; the test's folder is the working one."""
    shutil.copytree(right, tmp_path, dirs_exist_ok=True)
    return OWN_TABLE


def dry(own: dict[str, Any], *flags: str, **change: Any) -> Answer:
    return in_process("train", "--dry-run", *flags, *settings(**{**own, **change}))


def test_what_the_mistakes_below_are_made_of(own: dict[str, Any]) -> None:
    answer = dry(own)
    assert answer.code == 0, answer.err


TABLE: list[tuple[dict[str, Any], str]] = [
    ({"task__train_file": "~no-such-user/train.jsonl"}, "no such file: ~no-such-user/train.jsonl"),
    ({"task__train_file": LONG}, "task.train_file: no such file: "),
    ({"task__train_file": "a\0b.csv"}, "task.train_file: no such file: "),
    ({"task__train_file": "circle.csv"}, "task.train_file: no such file: circle.csv"),
    ({"task__train_file": "pipe.csv"}, "task.train_file: pipe.csv is neither a file nor a folder"),
    ({"task__train_file": ..., "task__path": "/dev/null"}, "task.path: /dev/null is neither a file nor a folder"),
    ({"task__train_file": ..., "task__path": LONG}, "task.path: no such file: "),
    ({"task__labels": ["no"]}, "task.labels: "),
    ({"task__labels": ["no", "yes"], "task__train_file": "three.jsonl"}, "is 2, which is none of the 2 known (0, 1)"),
    ({"task__train_file": "few.jsonl"}, "train has 31 rows, fewer than one global batch: train.global_batch_size is 32"),
    ({"task__validation_file": "empty.jsonl"}, "empty.jsonl: the file is empty"),
    ({"task__label_column": "text"}, "task.label_column"),
    ({"train__max_length": 3}, "train.max_length: 3; at least 4 is needed: 3 tokens of a pair of texts are special"),
]


@pytest.mark.parametrize(("change", "message"), TABLE, ids=range(len(TABLE)))
def test_tables(own: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "three.jsonl").write_text("\n".join([*rows, json.dumps({"text": "a", "verdict": 2})]))
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:31]))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "circle.csv").symlink_to("circle.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(dry(own, **change), message)


def test_rows_that_are_all_too_long_are_cut_and_told(own: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert dry(own, train__max_length=4).code == 0
    assert "train: 64 of 64 rows (100.0 %) are longer than train.max_length 4 and lose their end" in caplog.text


@pytest.mark.parametrize("task", ["mrpc", "squad-v1", "table"])
def test_the_hub_is_out_of_reach(own: dict[str, Any], task: str) -> None:
    change = {"task__name": task, "task__train_file": ..., "task__validation_file": ..., "task__hub": "no-one/no-data"}
    if task != "table":
        change |= {"task__text_columns": ..., "task__label_column": ..., "train__max_length": 48}
    if task == "squad-v1":
        change |= {"task__doc_stride": 8}
    message = "task.hub: the data set 'no-one/no-data' cannot be loaded ("
    refused(dry(own, **change), message)


def test_a_split_that_the_hub_has_not(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("hub/trian", {"text": ["a"], "verdict": [1]}, str)
    monkeypatch.setattr("progscale.tasks.sources.load_hub", lambda name: {"trian": table, "test": table})
    change = {"task__train_file": ..., "task__validation_file": ..., "task__hub": "no-one/data"}
    refused(dry(own, **change), "no-one/data has no split 'train' (trian, test); did you mean 'trian'?")


OVERRIDES: list[tuple[dict[str, Any], str]] = [
    (
        {"hidden_size": 15},
        "cannot be built from its config and model.overrides (ValueError: The hidden size (15) is not a multiple",
    ),
    ({"hidden_act": "rleu"}, "cannot be built from its config and model.overrides (KeyError: 'rleu')"),
    ({"hidden_dropout_prob": 2.0}, "dropout probability has to be between 0 and 1"),
    ({"vocab_size": 10**20}, "cannot be built from its config"),
    ({"hidden_size": 0}, "model.overrides.hidden_size: 0; at least 1 is needed"),
    ({"num_hidden_layers": -1}, "model.overrides.num_hidden_layers: -1; at least 1"),
    ({"max_position_embeddings": 0}, "model.overrides.max_position_embeddings: 0; at least 1"),
    ({"type_vocab_size": 0}, "model.overrides.type_vocab_size: 0; at least 1"),
    (
        {"hidden_size": None},
        "model.overrides.hidden_size: None is refused (Validation error for field 'hidden_size': TypeError: ",
    ),
    ({"return_dict": False}, "model.overrides.return_dict: cannot be changed here; outputs are read by their names"),
    ({"is_decoder": True}, "model.overrides.is_decoder: cannot be changed here; the family says what a block is"),
    ({"add_cross_attention": True}, "model.overrides.add_cross_attention: cannot be changed here"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), OVERRIDES, ids=lambda value: json.dumps(value) if isinstance(value, dict) else ""
)
def test_overrides_that_the_model_contradicts(overrides: dict[str, Any], message: str) -> None:
    refused(in_process("train", "--dry-run", *settings(model__overrides=overrides)), message)


CONFIGS: list[tuple[dict[str, Any] | str, str]] = [
    ({"hidden_size": 15}, "model 'model': it cannot be built from its config"),
    ({"model_type": ["bert"]}, "model_type is ['bert']; a string is needed"),
    ({"model_type": 3}, "model_type is 3; a string is needed"),
    ("[" * 100_000, "config.json is not JSON (maximum recursion depth"),
    ({"vocab_size": "many"}, "its config cannot be read (Validation error for field 'vocab_size': TypeError"),
    ({"vocab_size": 20}, "the tokenizer has token ids up to 49, the model's embeddings 20 rows (0 to 19)"),
    (
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}},
        "which is only run with --trust-remote-code on the command line",
    ),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=range(len(CONFIGS)))
def test_configs_of_models(own: dict[str, Any], tmp_path: Path, config: dict[str, Any] | str, message: str) -> None:
    path = tmp_path / "model" / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps({**json.loads(path.read_text()), **config}))
    refused(dry(own), message)


def test_a_plan_of_a_model_that_brings_code(own: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    classes = {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"}
    path.write_text(json.dumps({**config, "model_type": "mine", "auto_map": classes}))
    lines = ["import transformers as t", "class C(t.BertConfig):", "    model_type = 'mine'"]
    lines += ["class M(t.BertForSequenceClassification):", "    config_class = C", ""]
    (tmp_path / "model" / "mine.py").write_text("\n".join(lines))
    plan = ("plan", "--model", "model", "--set", "model.family=bert")
    refused(in_process(*plan), "which is only run with --trust-remote-code on the command line")
    assert in_process(*plan, "--trust-remote-code").code == 0


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bloom", "'bloom' is decoder-only: progscale/models/families/llama.py is an example of such a family"),
        ("bart", "'bart' is an encoder-decoder: name both of its lists of blocks in `stacks`"),
        ("nystromformer", "no model family for model type 'nystromformer'; known: albert, bert, big_bird, camembert"),
        ("", "config.json has no model_type, which says what to build; known: albert, bert, big_bird, camembert"),
    ],
)
def test_models_of_other_kinds(own: dict[str, Any], tmp_path: Path, model_type: str, message: str) -> None:
    """What to do about it takes some lines."""
    config = AutoConfig.for_model(model_type).to_dict() if model_type else {"hidden_size": 16}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config, default=str))
    answer = dry(own)
    assert answer.code == 2
    assert answer.err.startswith("progscale: ")
    assert message in answer.err
    assert "Traceback" not in answer.err


TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"pad_token": None}, "the tokenizer has no pad token, so examples cannot be batched"),
    ({"model_input_names": ["token_type_ids"]}, "the tokenizer's model_input_names are token_type_ids; input_ids is needed"),
    ({"model_input_names": 3}, "tokenizer 'model': its files cannot be read ("),
]


@pytest.mark.parametrize(("change", "message"), TOKENIZERS, ids=range(len(TOKENIZERS)))
def test_tokenizers(own: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(dry(own), message)


@pytest.mark.parametrize("key", ["model__name", "model__tokenizer"])
@pytest.mark.parametrize("name", ["~no-such-user/model", LONG, "a\0b", "no-one/no-model", "a b"], ids=lambda name: name[:8])
def test_names_of_models(own: dict[str, Any], key: str, name: str) -> None:
    kind = key.removeprefix("model__").replace("name", "model")
    refused(dry(own, **{key: name}), f"{kind} '{name}': ")


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder / "model.safetensors.index.json"


WEIGHTS: list[tuple[Callable[[Path], Any], tuple[str, ...], str]] = [
    (lambda folder: without_weights(folder).write_text("[" * 100_000), (), "is not an index of safetensors files ("),
    (
        lambda folder: without_weights(folder).write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        (),
        "only *.safetensors files beside",
    ),
    (
        lambda folder: without_weights(folder).write_text(json.dumps({"weight_map": {"a": f"{LONG}.safetensors"}})),
        (),
        "is missing; model.",
    ),
    (without_weights, (), "they are only loaded with --allow-pickle on the command line"),
    (without_weights, ("--allow-pickle",), "its weights cannot be loaded (Error no file named model.safetensors"),
    (
        lambda folder: without_weights(folder).with_name("pytorch_model.bin").write_bytes(b"junk"),
        ("--allow-pickle",),
        "model 'model': its weights cannot be loaded (",
    ),
]


@pytest.mark.parametrize(("spoil", "flags", "message"), WEIGHTS, ids=range(len(WEIGHTS)))
def test_weights(own: dict[str, Any], tmp_path: Path, spoil: Callable[[Path], Any], flags: tuple[str, ...], message: str) -> None:
    spoil(tmp_path / "model")
    refused(in_process("train", *flags, *settings(**own)), message)
    assert not (tmp_path / "runs" / "a" / "summary.json").exists()


def test_labels_beyond_number() -> None:
    refused(in_process("plan", "--model", "bert-base-uncased", "--num-labels", str(10**12)), "num_labels: 1000000000000; at most")


# -- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["code of progscale", "release of torch"])
def test_ranks_with_different_code(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """As on nodes with checkouts or environments of their own."""

    def gather(mine: tuple[str, dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
        other = ("node7", {**mine[1], what: "another"})
        return [("node1", mine[1]), mine, other, other]

    monkeypatch.setattr("progscale.joining.ranks.gather_objects", gather)
    expected = f"the {what} on rank 2, 3 (node7) is not that of rank 0 (node1); start all alike"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_same_on_all_ranks(load_config())


@pytest.mark.parametrize(
    ("world_size", "message"),
    [(3, "32 rows cannot be shared equally by 3 processes; use 30 or 33"), (40, "shared equally by 40 processes; use 40")],
)
def test_more_processes_than_rows_can_be_shared_by(world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"train.global_batch_size: .*{message}$"):
        micro_batch_size(load_config(), world_size)


def test_a_precision_that_needs_a_gpu() -> None:
    refused(
        in_process("train", "--dry-run", *settings(train__precision="fp16")), "'fp16' is not supported on this CPU; take 'bf16'"
    )


# -- what is not met yet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "./my_plugin.py"])
def test_plugins_that_are_no_module_names(name: str) -> None:
    refused(in_process("train", "--dry-run", "--plugin", name), "--plugin")


@pytest.mark.parametrize("command", [("train", "--resume"), ("checkpoint", "verify")], ids=" ".join)
def test_a_checkpoint_whose_name_is_too_long(command: tuple[str, ...]) -> None:
    refused(in_process(*command, LONG), "checkpoint ")


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000], ids=lambda text: text[:3])
def test_going_on_in_a_folder_with_somebody_elses_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for name, text in (("config.json", content), ("summary.json", "{}")):
        (tmp_path / "runs" / "a" / name).write_text(text)
    refused(short_run("runs", "a", "--resume", "auto"), "choose another with --set run.name=…")


RENDEZVOUS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
LAUNCHERS: dict[str, dict[str, str]] = {
    "RANK alone": {"RANK": "0"},
    "LOCAL_RANK alone": {"LOCAL_RANK": "0"},
    "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
    "WORLD_SIZE in words": {"WORLD_SIZE": "four"},
    "LOCAL_WORLD_SIZE of nothing": {"LOCAL_WORLD_SIZE": "0"},
    "a rank beyond the world": {**RENDEZVOUS, "RANK": "3"},
    "no address": {key: value for key, value in RENDEZVOUS.items() if key != "MASTER_ADDR"},
    "a port that is none": {**RENDEZVOUS, "MASTER_PORT": "99999"},
    "a port in use": {**RENDEZVOUS, "MASTER_PORT": "taken"},
}
# Each in a process of its own, which begins with everything imported.
IN_PROCESSES = """
import json, os, signal, socket, sys
import progscale.run
from progscale.cli import main

server = socket.socket()
server.bind(("127.0.0.1", 0))
server.listen()
found = {}
for case, variables in json.loads(sys.argv[1]).items():
    out, into = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os.dup2(into, 2)
        os.environ.update({key: str(server.getsockname()[1]) if value == "taken" else value for key, value in variables.items()})
        code = 1
        try:
            code = main(["train", "--dry-run"])
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)
    os.close(into)
    with open(out) as pipe:
        said = pipe.read()
    found[case] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said[-500:]]
print(json.dumps(found), file=sys.__stdout__)
"""


@pytest.mark.slow
def test_a_launchers_variables_that_do_not_fit(tmp_path: Path) -> None:
    """`progscale doctor` names them."""
    hidden = (*RENDEZVOUS, "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_PROCESSES, json.dumps(LAUNCHERS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    refused_all = {case for case, (code, said) in found.items() if code == 2 and said.startswith("progscale: ")}
    assert refused_all == set(LAUNCHERS), found
