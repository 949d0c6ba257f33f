"""The demo from the command to the exported model: alone, under the launcher, on two processes, and when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from progscale.engine.local import LocalEngine
from progscale.optim import StageBuild
from progscale.tasks.base import TASKS
from progscale.tasks.demo import DemoTask, demo_sentences, demo_tokenizer
from tests.harness.audit import flip_bit
from tests.harness.programs import REPOSITORY, TWO, Answer, config_file, in_process, launched, records, settings, summary_of
from tests.tiny import tiny_model

SUMMARY_KEYS = {"updated_parameters", "baseline_updated_parameters", "metrics", "train_seconds", "world_size", "stages"}
STAGE_KEYS = {
    *("stage", "first_block", "trainable_parameters", "updated_parameters", "train_seconds", "switch_seconds"),
    *("samples_per_second", "tokens_per_second", "peak_memory_bytes", "optimizer_state_bytes", "frozen_changed"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the small demo in one process; the others are compared with it."""
    folder = tmp_path_factory.mktemp("alone")
    answer = in_process("train", *settings(run__output_dir=str(folder)))
    assert answer.code == 0, answer.err
    return folder / "a"


def test_the_run_folder(alone: Path) -> None:
    files = {"config.json", "plan.json", "metrics.jsonl", "summary.json", "report.html", "model", "checkpoints", ".lock"}
    assert {path.name for path in alone.iterdir()} == files
    summary = summary_of(alone)
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["world_size"], summary["engine"], summary["steps"]) == (1, "plain", 6)
    assert len(summary["stages"]) == 3
    for stage in summary["stages"]:
        assert stage.keys() >= STAGE_KEYS
        assert stage["updated_parameters"] == stage["planned_updated_parameters"] > 0
        assert stage["frozen_changed"] == stage["skipped_steps"] == 0
        assert stage["samples_per_second"] > 0
        assert stage["tokens_per_second"] > 0
    assert [stage["first_block"] for stage in summary["stages"]] == [0, 2, 4]
    assert summary["updated_parameters"] == summary["planned_updated_parameters"] < summary["baseline_updated_parameters"]
    assert summary["train_seconds"] == pytest.approx(sum(stage["train_seconds"] for stage in summary["stages"]))
    assert [record["step"] for record in records(alone, "step")] == [1, 2, 3, 4, 5, 6]
    assert [record["stage"] for record in records(alone, "step")] == [1, 1, 2, 2, 3, 3]
    assert len(records(alone, "stage")) == 3
    assert {key: records(alone, "evaluation")[-1][key] for key in summary["metrics"]} == summary["metrics"]


def test_the_exported_model_scores_what_the_run_scored(alone: Path) -> None:
    """Loaded by somebody who knows nothing of progscale: the same loss and accuracy on the same sentences."""
    model = AutoModelForSequenceClassification.from_pretrained(alone / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(alone / "model")
    assert model.config.id2label == {0: "hunter_acts", 1: "grazer_acts"}
    texts, labels = demo_sentences(51, np.random.default_rng([42, 1]))
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    wanted = summary_of(alone)["metrics"]
    assert (logits.argmax(1).numpy() == labels).mean() == pytest.approx(wanted["accuracy"])
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item() == pytest.approx(wanted["loss"], abs=1e-6)


def same_run(folder: Path, alone: Path, engine: str, world_size: int) -> None:
    """Losses, scores and weights of `folder` are those of the run in one process."""
    summary, expected = summary_of(folder), summary_of(alone)
    assert (summary["engine"], summary["world_size"]) == (engine, world_size)
    losses = [[record["loss"] for record in records(run, "step")] for run in (folder, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    rates = [[record["learning_rate"] for record in records(run, "step")] for run in (folder, alone)]
    assert rates[0] == rates[1]
    # Over all 51 rows, an odd number: a row left out or counted twice would move the mean.
    assert summary["metrics"]["accuracy"] == expected["metrics"]["accuracy"]
    assert summary["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=1e-5)
    for stage, wanted in zip(summary["stages"], expected["stages"], strict=True):
        for key in ("stage", "first_block", "start_step", "end_step", "trainable_parameters", "updated_parameters"):
            assert stage[key] == wanted[key]
        assert stage["frozen_changed"] == 0
    models = [AutoModelForSequenceClassification.from_pretrained(run / "model").state_dict() for run in (folder, alone)]
    for name, value in models[1].items():
        assert (models[0][name] - value).abs().max().item() < 5e-5, name


def test_the_launcher_with_one_process(alone: Path, tmp_path: Path) -> None:
    """As the README says it, on a machine where nothing is set up."""
    answer = launched(tmp_path, [*config_file("zero2"), *settings()])
    assert answer.code == 0, answer.err
    same_run(tmp_path / "runs" / "a", alone, "zero2", 1)


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes(alone: Path, tmp_path: Path, engine: str) -> None:
    answer = launched(tmp_path, [*config_file("demo"), *config_file(engine), *settings()], launcher=TWO)
    assert answer.code == 0, answer.err
    same_run(tmp_path / "runs" / "a", alone, engine, 2)
    assert answer.out.count("What each stage did") == 1, "one process speaks"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__epochs": "three"}, 'train.epochs: "three" (from --set) must be a number'),
        (
            {"train__global_batch_size": 33},
            "train.global_batch_size: 33 rows cannot be shared equally by 2 processes; use 32 or 34",
        ),
        ({"engine__name": "plain"}, "engine.name: 'plain' is one process, but 2 were started"),
    ],
)
def test_a_mistake_under_the_launcher_is_said_once(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    answer = launched(tmp_path, settings(**change), launcher=TWO)
    assert answer.code != 0
    (said,) = [line for line in answer.err.splitlines() if line.startswith("progscale: ")]
    assert said.startswith(f"progscale: {message}")
    assert f'File "{REPOSITORY}/progscale' not in answer.err, "a traceback of ours"
    assert not (tmp_path / "runs").exists()


class Poisoned(DemoTask):
    """The demo, with an infinite loss in some training steps."""

    bad_steps: tuple[int, ...] = ()

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.name = "poisoned"
        self.step = 0

    def loss(self, outputs: Any, labels: Any) -> torch.Tensor:
        value = super().loss(outputs, labels)
        if not torch.is_grad_enabled():
            return value
        self.step += 1
        return value * float("inf") if self.step - 1 in self.bad_steps else value


@pytest.fixture
def poisoned(tmp_path: Path) -> Iterator[list[str]]:
    """Registers the poisoned task; gives the settings of a run on it, with a model from a folder."""
    config = tiny_model("bert", blocks=3).config
    tiny_model("bert", blocks=3).save_pretrained(tmp_path / "model")
    demo_tokenizer().save_pretrained(tmp_path / "model")
    assert config.vocab_size >= len(demo_tokenizer())
    TASKS.add("poisoned", Poisoned)
    yield settings(
        run__output_dir=str(tmp_path / "runs"),
        task__name="poisoned",
        model__name=str(tmp_path / "model"),
        train__max_length=64,
        train__micro_batch_size=32,
    )
    TASKS.remove("poisoned")


def run_poisoned(arguments: list[str], bad_steps: tuple[int, ...], policy: str) -> Answer:
    Poisoned.bad_steps = bad_steps
    # A registered name that no package brings: only a plug-in may add one.
    return in_process("train", *arguments, "--set", f"train.nonfinite={policy}", "--plugin", "tests.integration.test_demo")


def test_a_loss_that_is_not_finite_stops_the_run(poisoned: list[str], tmp_path: Path) -> None:
    answer = run_poisoned(poisoned, (3,), "stop")
    assert answer.code == 3
    assert "step 3: the loss is not finite on rank 0; the weights are those of the step before" in answer.err
    assert "train.nonfinite=skip:3" in answer.err
    folder = tmp_path / "runs" / "a"
    assert not (folder / "summary.json").exists()
    assert not (folder / "model").exists()
    (record,) = records(folder, "nonfinite")
    assert (record["step"], record["fault"], record["ranks"], len(record["rows"])) == (3, "loss", [0], 32)
    assert len(records(folder, "step")) == 3


def test_skipped_steps_are_counted(poisoned: list[str], tmp_path: Path) -> None:
    answer = run_poisoned(poisoned, (1, 3, 4), "skip:2")
    assert answer.code == 0, answer.err
    folder = tmp_path / "runs" / "a"
    summary = summary_of(folder)
    assert [stage["skipped_steps"] for stage in summary["stages"]] == [1, 1, 1]
    for stage in summary["stages"]:
        assert stage["updated_parameters"] == pytest.approx(stage["planned_updated_parameters"] / 2)
        assert stage["frozen_changed"] == 0
    assert np.isfinite(summary["metrics"]["loss"])
    assert [record["step"] for record in records(folder, "nonfinite")] == [1, 3, 4]


def test_too_many_skipped_in_a_row(poisoned: list[str]) -> None:
    answer = run_poisoned(poisoned, (1, 3, 4, 5), "skip:2")
    assert answer.code == 3
    assert "step 5: the loss is not finite on rank 0 (3 steps in a row)" in answer.err


def test_the_audit_watches_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen tensor that changes while its stage is built stops the run."""
    build_rightly = LocalEngine._build

    def build_carelessly(self: LocalEngine, build: StageBuild) -> None:
        build_rightly(self, build)
        if build.stage.index == 2:
            flip_bit(next(parameter.data for name, parameter in self.parameters.items() if name not in build.live))

    monkeypatch.setattr(LocalEngine, "_build", build_carelessly)
    answer = in_process("train", *settings(run__output_dir=str(tmp_path)))
    assert answer.code == 3
    assert "stage 2: 1 frozen tensors changed their bits" in answer.err
