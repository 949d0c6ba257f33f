"""Every shipped config loads, alone or with what it needs, in any order; the accelerate files start what they say."""

import json
import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import pytest

from progscale.config import DEMO_DEFAULTS, config_hash, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
ENGINES = sorted(CONFIGS.glob("*.json"))
MODELS = sorted((CONFIGS / "models").glob("*.json"))
TASKS = sorted((CONFIGS / "tasks").glob("*.json"))

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def test_all_are_there() -> None:
    engines = {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-hpz"}
    assert {path.stem for path in ENGINES} == {"demo", "ddp", *engines}
    assert {path.stem for path in TASKS} == {*GLUE, "squad-v1", "squad-v2"}
    assert len(MODELS) == 6


@pytest.mark.parametrize("path", [*ENGINES, *MODELS], ids=lambda path: path.stem)
def test_alone(path: Path) -> None:
    config = load_config([path])
    assert config.task.name == "demo"
    assert config.description


@pytest.mark.parametrize("path", [*ENGINES, *MODELS, *TASKS], ids=lambda path: path.stem)
def test_says_what_it_is(path: Path) -> None:
    assert len(json.loads(path.read_text())["description"]) > 30


@pytest.mark.parametrize(("model", "task"), product(MODELS, TASKS), ids=lambda path: path.stem)
def test_every_combination_in_every_order(model: Path, task: Path) -> None:
    for engine in ENGINES:
        if engine.stem == "demo":
            continue
        hashes = {config_hash(load_config(order)) for order in permutations([model, task, engine])}
        assert len(hashes) == 1


def test_layers_own_their_side() -> None:
    for path in MODELS:
        values = json.loads(path.read_text())
        assert set(values) == {"description", "model", "optimizer", "train"}
        assert not {"epochs", "max_length"} & set(values["train"])
    for path in TASKS:
        values = json.loads(path.read_text())
        assert set(values) == {"description", "task", "train"}
        assert set(values["train"]) <= {"epochs", "max_length", "eval_batch_size"}


@pytest.mark.parametrize(
    ("name", "epochs", "max_length"), [*((name, 3, 128) for name in GLUE), ("squad-v1", 3, 384), ("squad-v2", 2, 384)]
)
def test_task_values(name: str, epochs: int, max_length: int) -> None:
    config = load_config([CONFIGS / "tasks" / f"{name}.json", CONFIGS / "models" / "bert-base.json"])
    assert (config.task.name, config.train.epochs, config.train.max_length) == (name, epochs, max_length)
    assert config.stages == epochs


def test_demo_layer_is_what_a_bare_run_takes() -> None:
    assert config_hash(load_config([CONFIGS / "demo.json"])) == config_hash(load_config())
    assert json.loads((CONFIGS / "demo.json").read_text())["optimizer"] == DEMO_DEFAULTS["optimizer"]


def test_xl_recomputes_activations() -> None:
    assert load_config([CONFIGS / "models" / "xlm-roberta-xl.json"]).train.gradient_checkpointing


ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def test_accelerate_files_are_there() -> None:
    assert {path.stem for path in ACCELERATE} == {"cpu2", "gpu1", "multi-gpu", "multi-node", "multi-node-cpu"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_file(path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(path))
    assert config.deepspeed_config == {}
    assert config.mixed_precision == "no"
    assert path.read_text().startswith("#")


PROGRAM = """
import os, torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
total = accelerator.reduce(torch.tensor([float(os.environ["RANK"]) + 1]))
assert torch.distributed.get_backend() == "gloo"
with open(os.path.join(os.path.dirname(__file__), "rank" + os.environ["RANK"]), "w") as file:
    file.write(f"{os.environ['WORLD_SIZE']} {total.item()}")
accelerator.end_training()
"""


def test_cpu2_starts_two_ranks_over_gloo(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / "cpu2.yaml")]
    done = subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / name).read_text() for name in ("rank0", "rank1")] == ["2 3.0", "2 3.0"]
