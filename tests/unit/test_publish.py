"""A run's model for others: files, card, and the hub where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from progscale.cli import main
from progscale.errors import ReportError
from progscale.publish import export_run, push
from tests.harness.reports import write_run


def run_with_model(folder: Path, *, adapter: bool = False, sets: tuple[str, ...] = (), **options: Any) -> Path:
    run = write_run(folder / "mrpc-x", sets=sets, **options)
    (run / "model").mkdir()
    origin = {
        "step": 20,
        "metrics": {"accuracy": 0.9, "loss": 0.5},
        "model": {"head": "sequence_classification", "num_labels": 3},
    }
    (run / "model" / "progscale.json").write_text(json.dumps(origin))
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    if adapter:
        (run / "model" / "adapter_config.json").write_text("{}")
    return run


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_files_and_card(tmp_path: Path) -> None:
    run = run_with_model(tmp_path, sets=("model.name=bert-base-uncased", "task.name=mrpc"))
    target = export_run(run, tmp_path / "mine")
    assert {path.name for path in target.iterdir()} == {"README.md", "model.safetensors", "progscale.json", "report.html"}
    data, text = card_of(target)
    assert (data["library_name"], data["base_model"], data["pipeline_tag"]) == (
        "transformers",
        "bert-base-uncased",
        "text-classification",
    )
    assert data["datasets"] == ["nyu-mll/glue"]
    (result,) = data["model-index"][0]["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", 0.9)]
    assert "After step 20 of 30, on validation (20 rows)." in text
    assert "| 2 | 10 to 19 | `··████` | 2 | trained | 800 | 800.0 |" in text
    assert "2.400 k measured, 2.400 k planned, 3.000 k without stages (20.0 % fewer)" in text
    assert "progscale train" in text
    assert 'AutoModelForSequenceClassification.from_pretrained("mrpc-x")' in text
    assert '"hash"' not in text


def test_an_adapter_says_on_what_it_sits(tmp_path: Path) -> None:
    target = export_run(run_with_model(tmp_path, adapter=True, sets=("model.name=bert-base-uncased",)), tmp_path / "mine")
    data, text = card_of(target)
    assert data["library_name"] == "peft"
    assert 'from_pretrained("bert-base-uncased", num_labels=3)' in text


def test_a_folder_of_ones_own_is_no_name_for_others(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    target = export_run(run_with_model(tmp_path, sets=(f"model.name={tmp_path / 'base'}",)), tmp_path / "mine")
    assert "base_model" not in card_of(target)[0]


def test_energy_where_it_was_read(tmp_path: Path) -> None:
    target = export_run(run_with_model(tmp_path, stage={"energy_joules": 3600.0}), tmp_path / "mine")
    assert "energy of the GPUs while training: 3.00 Wh" in card_of(target)[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"finished": False}, "has not ended"), ({"stage": {"frozen_changed": 1}}, "frozen tensors have changed")],
)
def test_what_is_no_model_for_others(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ReportError, match=says):
        export_run(run_with_model(tmp_path, **options), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_no_model_damaged_or_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"has no model \(train.save_model was 'best'"):
        export_run(write_run(tmp_path / "none"), tmp_path / "mine")
    run = run_with_model(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ReportError, match="exists and is not empty"):
        export_run(run, tmp_path / "full")
    (run / "model" / "progscale.json").write_text("{}")
    with pytest.raises(ReportError, match="is damaged"):
        export_run(run, tmp_path / "mine")


class Hub:
    """What is used of huggingface_hub's API."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> Any:
        self.calls.append(("create", repository, private, exist_ok))

        class Address(str):
            repo_id = f"me/{repository}"

        return Address(f"https://hub/me/{repository}")

    def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", Path(folder_path).name, repo_id, commit_message))
        return SimpleNamespace()


def test_to_the_hub(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    hub = Hub()
    assert push(tmp_path / "mine", "x", private=True, api=hub) == "https://hub/me/x"
    assert hub.calls == [("create", "x", True, True), ("upload", "mine", "me/x", "mine, trained with progscale")]


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="--push-to-hub x: no route; what was exported stays in"):
        push(tmp_path, "x", private=False, api=Hub(ConnectionError("no route\nto host")))


def test_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="--push-to-hub a/b/c: "):
        push(tmp_path, "a/b/c", private=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with_model(tmp_path)
    assert main(["export", str(run), str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine")
    assert main(["export", str(run), str(tmp_path / "other"), "--private"]) == 2
    assert "--private: given without --push-to-hub" in capsys.readouterr().err
