"""What `import progscale` offers, and that the programs in the README and in docs/integrations.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import progscale
from tests.harness.pages import blocks, run_program
from tests.harness.programs import REPOSITORY

# What a reader of the page has already.
GIVEN = """
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from tests.tiny import tiny_model

class Rows(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, row):
        tokens = torch.randint(5, 101, (8,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[1] % 2}

def rate(step):
    return 1e-3

model = tiny_model("bert", blocks=6)
train = validation = Rows()
loader = DataLoader(Rows(), batch_size=4)
args = TrainingArguments("out", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
trainer = Trainer(model, args, train_dataset=train)
"""


CASES = [
    (page, number) for page in ("README.md", "docs/integrations.md") for number in range(len(blocks(REPOSITORY / page, "python")))
]


@pytest.mark.parametrize(("page", "number"), CASES)
def test_a_program_runs_as_it_stands(tmp_path: Path, page: str, number: int) -> None:
    program = blocks(REPOSITORY / page, "python")[number]
    needs = GIVEN if re.search(r"\b(trainer|model|loader)\b", program) and "register_family" not in program else ""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    said = run_program(needs + program, tmp_path)
    if "progscale.train" in program:
        assert "accuracy" in said
        assert (tmp_path / "runs" / "mine" / "report.html").exists()


def test_there_are_programs() -> None:
    assert len(CASES) >= 5


def test_names() -> None:
    assert dir(progscale) == progscale.__all__
    for name in progscale.__all__:
        assert getattr(progscale, name) is not None
        if name != "__version__":
            assert getattr(progscale, name).__doc__
    with pytest.raises(AttributeError, match="module 'progscale' has no attribute 'trian'"):
        progscale.trian  # noqa: B018


def test_importing_it_is_light() -> None:
    program = "import sys, progscale; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


def test_it_is_typed(tmp_path: Path) -> None:
    """A program that uses it wrongly is told so by a type checker."""
    (tmp_path / "use.py").write_text("import progscale\nprogscale.train(3)\nreveal_type(progscale.load_config([]))\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml"), str(tmp_path / "use.py")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert 'incompatible type "int"; expected "Config"' in done.stdout
    assert 'Revealed type is "progscale.config.schema.Config"' in done.stdout
