"""What only the whole program can see wrong: schedule against model and steps, folders, data and model together."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.pickles import pickled
from tests.harness.programs import Answer, in_process, settings
from tests.harness.tables import OWN_TABLE, write_table
from tests.harness.worker import TwoRanks
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("empty_folder")


def refused(answer: Answer, message: str) -> None:
    assert answer.code == 2, answer.err
    assert answer.err.startswith("progscale: ")
    assert answer.err.count("\n") == 1, "one message in one line"
    assert message in answer.err


SCHEDULES: list[tuple[dict[str, Any], str]] = [
    ({"schedule__stages": 7}, "schedule.stages: 7 stages for a run of 6 optimizer steps; at most 6 are possible"),
    (
        {"schedule__name": "custom", "schedule__stages": ..., "schedule__first_blocks": [0, 3, 7]},
        "schedule.first_blocks: 7 is not a block; the model has 6 blocks, so 0 to 6 are allowed",
    ),
    (
        {"schedule__name": "custom", "schedule__first_blocks": [1, 2, 3]},
        "schedule.first_blocks: [1, 2, 3] never trains the blocks below 1",
    ),
    (
        {"schedule__name": "weighted", "schedule__block_weights": [1.0, 1.0, 1.0]},
        "schedule.block_weights: 3 weights for a model of 6 blocks",
    ),
    ({"schedule__starts": [0, 2, 6]}, "schedule.starts: 6 lies beyond the run's 6 optimizer steps"),
    ({"train__max_steps": 2}, "schedule.stages: 3 stages for a run of 2 optimizer steps"),
    ({"train__max_length": 65}, "65"),
    ({"train__gradient_accumulation_steps": 3, "train__global_batch_size": 33, "train__micro_batch_size": 10}, "33"),
]


@pytest.mark.parametrize(("change", "message"), SCHEDULES, ids=lambda value: "" if isinstance(value, str) else str(value))
def test_schedules_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(in_process("train", *settings(**change)), message)
    assert list(tmp_path.iterdir()) == [], "the run folder is not touched"


@pytest.mark.parametrize(("stages", "epochs"), [(1, 1), (6, 1), (4, 1), (12, 2), (1, 0.5)])
def test_numbers_of_stages_that_are_no_mistake(stages: int, epochs: float) -> None:
    """One stage is plain fine-tuning; more stages than blocks, and blocks that do not divide, follow the even rule."""
    answer = in_process("train", "--dry-run", *settings(schedule__stages=stages, train__epochs=epochs))
    assert answer.code == 0, answer.err


def test_run_folders(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "thesis.txt").write_text("precious")
    refused(in_process("train", *settings()), "'runs/a' exists and is no run folder; choose another with --set run.name=…")
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "config.json").write_text('{"hash": "of another"}')
    refused(in_process("train", *settings(run__name="b")), "'runs/b' holds a run of another config")
    (tmp_path / "file").write_text("")
    refused(in_process("train", *settings(run__output_dir="file")), "run.output_dir: 'file/a' cannot be written (")
    assert (tmp_path / "runs" / "a" / "thesis.txt").read_text() == "precious"


def test_odd_folder_names_work(tmp_path: Path) -> None:
    name = "Üben mit  Leerzeichen #1"
    change = {"run__output_dir": str(tmp_path / "mes résultats"), "run__name": name, "train__max_steps": 3}
    assert in_process("train", *settings(**change)).code == 0
    assert (tmp_path / "mes résultats" / name / "summary.json").exists()


def test_a_fault_of_the_main_process_reaches_all_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    path = tmp_path / "a"
    function = "tests.harness.programs:folder_on_all_ranks"
    assert two_ranks.run(function, path=str(path)) == ["a folder", "nothing"]
    (path / "config.json").write_text('{"hash": "of another"}')
    first, second = two_ranks.run(function, path=str(path))
    assert first == second
    assert "holds a run of another config" in first


def test_any_failure_of_the_main_process_reaches_all_ranks(two_ranks: TwoRanks) -> None:
    """A full disk, say: the main process shows what happened, and nobody is left waiting."""
    first, second = two_ranks.run("tests.harness.programs:failing_main")
    assert first == "OSError: [Errno 28] No space left on device"
    assert second == "ProgscaleError: rank 0 failed: OSError: [Errno 28] No space left on device"


def test_ranks_with_different_configs(two_ranks: TwoRanks) -> None:
    function = "tests.harness.programs:same_config_on_all_ranks"
    assert two_ranks.run(function, seeds=[1, 1]) == ["", ""]
    told = two_ranks.run(function, seeds=[1, 2])
    here = socket.gethostname()
    assert told == [f"the config on rank 1 ({here}) is not that of rank 0 ({here}); start all alike"] * 2


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on a user's own table and model folder, both right."""
    write_table(tmp_path, tiny_model("bert", blocks=3))
    return OWN_TABLE


def dry(own: dict[str, Any], *flags: str, **change: Any) -> Answer:
    return in_process("train", "--dry-run", *flags, *settings(**{**own, **change}))


def test_what_the_mistakes_below_are_made_of(own: dict[str, Any]) -> None:
    answer = dry(own)
    assert answer.code == 0, answer.err
    assert "64 training rows, 2 steps of 32 rows" in answer.out


DATA: list[tuple[dict[str, Any], str]] = [
    ({"task__train_file": "trian.jsonl"}, "did you mean 'train.jsonl'?"),
    ({"task__text_columns": ["txt"]}, "did you mean 'text'?"),
    ({"task__label_column": "verdit"}, "did you mean 'verdict'?"),
    ({"task__metric": "acuracy"}, "did you mean 'accuracy'?"),
    ({"model__name": "modle"}, "'modle'"),
    ({"model__name": "./modle"}, "'./modle': no such folder"),
    ({"model__family": "roberta", "train__max_length": 48}, "'roberta'"),
    ({"train__max_length": 65}, "64"),
    ({"model__tokenizer": "no-tokenizer"}, "no-tokenizer"),
]


@pytest.mark.parametrize(("change", "message"), DATA, ids=lambda value: "" if isinstance(value, str) else str(value))
def test_data_and_model_before_any_weight(own: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    # Reading these weights would be another error.
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    refused(dry(own, **change), message)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_weights_that_would_run_code(own: dict[str, Any], tmp_path: Path, form: str) -> None:
    """A model's pickle is refused without being opened; allowed, torch itself unpickles no code."""
    model, marker = Path(own["model__name"]), tmp_path / "executed"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickled(marker, form))
    refused(in_process("train", *settings(**own)), "--allow-pickle")
    assert not marker.exists()
    assert in_process("train", "--allow-pickle", *settings(**own, run__name="b")).code == 2
    assert not marker.exists()


def test_weights_that_are_pickles(own: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("bert", blocks=3)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    refused(in_process("train", *settings(**own)), "--allow-pickle")
    assert not (tmp_path / "runs" / "a" / "summary.json").exists()
    assert in_process("train", "--allow-pickle", *settings(**own, run__name="b")).code == 0


def test_damaged_weights(own: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(in_process("train", *settings(**own)), "not a whole safetensors file")
