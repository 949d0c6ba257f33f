"""Every method from the command to the exported model, stopped and resumed, and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from progscale.config import load_config
from progscale.errors import ModelError
from progscale.export import load_exported, merge_exported
from progscale.methods import METHODS
from progscale.setup import prepare
from progscale.tasks.demo import demo_sentences
from tests.harness.programs import TWO, config_file, in_process, launched, records, settings, summary_of
from tests.harness.tables import OWN_TABLE, write_table
from tests.tiny import tiny_model

PEFT = [name for name in METHODS.names() if name != "full"]


def method(name: str, **options: Any) -> list[str]:
    return ["--set", f"method.name={name}", *(word for key, value in options.items() for word in option(key, value))]


def option(key: str, value: Any) -> list[str]:
    return ["--set", f"method.options.{key}={json.dumps(value)}"]


def score(model: Any, folder: Path) -> tuple[float, float]:
    """Accuracy and loss on the demo's evaluation sentences."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, labels = demo_sentences(51, np.random.default_rng([42, 1]))
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    return float((logits.argmax(1).numpy() == labels).mean()), loss


@pytest.mark.parametrize("name", PEFT)
def test_a_run(tmp_path: Path, name: str) -> None:
    """On random weights, which are kept beside the run, because an adapter is nothing without its base model."""
    answer = in_process("train", *settings(run__output_dir=str(tmp_path)), *method(name))
    assert answer.code == 0, answer.err
    run = tmp_path / "a"
    summary = summary_of(run)
    assert summary["method"] == name
    assert [stage["frozen_changed"] for stage in summary["stages"]] == [0, 0, 0]
    assert summary["updated_parameters"] == summary["planned_updated_parameters"] < summary["baseline_updated_parameters"]
    counts = [stage["trainable_parameters"] for stage in summary["stages"]]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3
    # The embeddings policy is 'always'; the method has nothing to train there.
    assert json.loads((run / "plan.json").read_text())["stages"][0]["embeddings"] is False
    assert json.loads((run / "config.json").read_text())["method"]["options"] == METHODS.get(name).Options().model_dump()
    assert (run / "base_model").exists() == (name not in ("full", "bitfit"))
    accuracy, loss = score(load_exported(run / "model"), run / "model")
    assert accuracy == pytest.approx(summary["metrics"]["accuracy"])
    assert loss == pytest.approx(summary["metrics"]["loss"], abs=1e-5)


def test_merge(tmp_path: Path) -> None:
    answer = in_process("train", *settings(run__output_dir=str(tmp_path)), *method("lora", rank=4, targets="all-linear"))
    assert answer.code == 0, answer.err
    answer = in_process("merge", str(tmp_path / "a" / "model"), str(tmp_path / "merged"))
    assert (answer.code, answer.out.strip()) == (0, f"merged into {tmp_path / 'merged'}")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert score(plain, tmp_path / "merged")[1] == pytest.approx(summary_of(tmp_path / "a")["metrics"]["loss"], abs=1e-5)
    (tmp_path / "a").rename(tmp_path / "b")
    assert in_process("merge", str(tmp_path / "b" / "model"), str(tmp_path / "again")).code == 0, "its base model moved with it"
    # Another run begins with other weights where the first one had its own.
    shutil.copytree(tmp_path / "b" / "base_model", tmp_path / "a" / "base_model")
    file = tmp_path / "a" / "base_model" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    own = score(load_exported(tmp_path / "b" / "model"), tmp_path / "b" / "model")[1]
    assert own == pytest.approx(score(plain, tmp_path / "merged")[1], abs=1e-5)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "a" / "base_model").rename(tmp_path / "elsewhere")
    for arguments, says in (
        ([str(tmp_path / "a" / "model"), str(tmp_path / "merged")], "there is something already"),
        ([str(tmp_path / "a"), str(tmp_path / "new")], f"did you mean {tmp_path / 'a' / 'model'}?"),
        ([str(tmp_path / "a" / "model"), str(tmp_path / "new")], "no such folder"),
    ):
        answer = in_process("merge", *arguments)
        assert answer.code == 2
        assert says in answer.err
    moved = ["--base", str(tmp_path / "elsewhere")]
    assert in_process("merge", str(tmp_path / "a" / "model"), str(tmp_path / "new"), *moved).code == 0


@pytest.mark.parametrize("name", PEFT)
def test_a_run_goes_on(tmp_path: Path, name: str) -> None:
    """Cut after its fourth step, it ends with the losses of a run that nobody cut."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = [*method(name), "--set", "checkpoint.every_steps=4"]
    assert in_process("train", *settings(run__output_dir=str(whole)), *extra).code == 0
    assert in_process("train", *settings(run__output_dir=str(cut)), *extra).code == 0
    for later in (cut / "a" / "checkpoints").glob("step-*"):
        if int(later.name.rpartition("-")[2]) > 4:
            shutil.rmtree(later)
    (cut / "a" / "summary.json").unlink()
    answer = in_process("train", *settings(run__output_dir=str(cut)), *extra, "--resume", "must")
    assert answer.code == 0, answer.err
    assert records(cut / "a", "resume")[-1]["step"] == 4
    losses = [[record["loss"] for record in records(folder / "a", "step")] for folder in (whole, cut)]
    assert losses[0] == losses[1]
    assert summary_of(whole / "a")["metrics"] == summary_of(cut / "a")["metrics"]


def test_options_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    base = settings(run__output_dir=str(tmp_path))
    assert in_process("train", *base, *method("lora", rank=4)).code == 0
    (tmp_path / "a" / "summary.json").unlink()
    answer = in_process("train", *base, *method("lora", rank=2), "--resume", "must")
    assert answer.code == 2
    assert "method.options" in answer.err and '"rank": 4' in answer.err and '"rank": 2' in answer.err
    # The default written out is the same run.
    answer = in_process("train", *base, *method("lora", rank=4, alpha=8.0), "--resume", "must")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lora", {"rnak": 4}, "method.options.rnak: unknown key; did you mean 'rank'?; 'lora' has rank, alpha"),
        ("lora", {"rank": 0}, "method.options.rank: 0 must be at least 1"),
        ("lora", {"rank": "4"}, 'method.options.rank: "4" must be a whole number; write it without quotes'),
        ("lora", {"init": "pisa"}, 'method.options.init: "pisa"'),
        ("lora", {"targets": ["nothing"]}, "method.options.targets: 'nothing' is no module of this BertFor"),
        ("adapter", {"activation": "gleu"}, "must be one of 'gelu', 'relu', 'silu', 'tanh'; did you mean 'gelu'?"),
        ("full", {"rank": 4}, "method.options.rank: unknown key; 'full' takes none"),
    ],
    ids=str,
)
def test_bad_options(tmp_path: Path, name: str, options: dict[str, Any], says: str) -> None:
    """Said before anything is written, and by a plan too."""
    answer = in_process("train", *settings(run__output_dir=str(tmp_path)), *method(name, **options))
    assert answer.code == 2
    assert says in answer.err
    assert not list(tmp_path.iterdir())


def test_a_plan_knows_methods() -> None:
    answer = in_process("plan", "--model", "roberta-base", "--epochs", "30", *method("lora"), "--format", "json")
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    assert round(plan["baseline_updated_parameters"] / 1e6, 2) == 26.61
    assert plan["method"] == "lora"


@pytest.mark.parametrize(("name", "engine"), [("qlora", "zero2"), ("adapter", "zero3")])
def test_two_processes(tmp_path: Path, name: str, engine: str) -> None:
    answer = launched(tmp_path, [*config_file(engine), *settings(), *method(name)], launcher=TWO)
    assert answer.code == 0, answer.err
    run = tmp_path / "runs" / "a"
    assert summary_of(run)["world_size"] == 2
    assert score(load_exported(run / "model"), run / "model")[1] == pytest.approx(summary_of(run)["metrics"]["loss"], abs=1e-5)
    if name == "qlora":
        answer = launched(tmp_path, [*config_file("zero3"), *settings(run__name="b"), *method("qlora")], launcher=TWO)
        assert answer.code != 0
        assert "'qlora' and ZeRO-3 do not go together" in answer.err


@pytest.mark.parametrize("name", ["adapter", "bitfit", "lora", "qlora"])
def test_a_checkpoint_without_a_pooler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As models saved with a masked-language head have none: it begins with random weights, so it is trained and exported."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path)
    tiny_model("bert", vocab_size=256).base_model.save_pretrained("model")
    weights = load_file("model/model.safetensors")
    save_file({key: value for key, value in weights.items() if "pooler" not in key}, "model/model.safetensors", {"format": "pt"})
    for options in ([], ["--dry-run"]):
        answer = in_process("train", *settings(**OWN_TABLE), *method(name), *options)
        assert answer.code == 0, answer.err
    summary = summary_of(tmp_path / "runs" / "a")
    assert summary["stages"][-1]["updated_parameters"] == summary["stages"][-1]["planned_updated_parameters"]
    exported = load_exported("runs/a/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/a/model")
    rows = [json.loads(line) for line in Path("dev.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = exported(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([row["verdict"] for row in rows]))
    assert loss.item() == pytest.approx(summary["metrics"]["loss"], abs=1e-5)
    if name == "lora":
        merge_exported("runs/a/model", "merged")
        merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()
        trained = exported.get_parameter("base_model.model.bert.pooler.modules_to_save.default.dense.weight")
        assert torch.equal(merged.bert.pooler.dense.weight, trained)


def test_what_a_method_refuses_is_refused_before_the_data_is_tokenised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def late(*arguments: Any) -> None:
        raise AssertionError("tokenised")

    monkeypatch.setattr("progscale.tasks.demo.DemoTask.tokenize", late)
    for changes, says in (
        ({"method__name": "lora", "method__options": {"targets": ["qery"]}}, "method.options.targets: 'qery' is no module"),
        ({"schedule__name": "custom", "schedule__stages": ..., "schedule__first_blocks": [0, 3, 7]}, "7 is not a block"),
        ({"train__global_batch_size": 30, "train__gradient_accumulation_steps": 4}, "train.gradient_accumulation_steps"),
    ):
        answer = in_process("train", *settings(run__output_dir=str(tmp_path), **changes))
        assert answer.code == 2
        assert says in answer.err
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_begin_leaves_its_folder_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights that do not load are found before the folder is touched; whatever comes later lets go of it."""
    config = load_config([], settings(run__output_dir=str(tmp_path))[1::2])

    def broken(*arguments: Any, **options: Any) -> None:
        raise ModelError("broken")

    monkeypatch.setattr("progscale.setup.load_module", broken)
    with pytest.raises(ModelError, match="broken"):
        prepare(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr("progscale.setup.create_engine", broken)
    for _ in range(2):
        with pytest.raises(ModelError, match="broken"):
            prepare(config)
