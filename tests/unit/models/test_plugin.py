"""Somebody else's encoder plugs in with one Family: from an installed package, or from a plain module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENCODER = '''
"""An encoder that knows nothing of transformers."""
from types import SimpleNamespace

import torch
from torch import nn

from progscale.models.family import Family, ModelRequest, register_family


class Trunk(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.tokens = nn.Embedding(50, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(blocks))
        self.final = nn.LayerNorm(width)


class Model(nn.Module):
    def __init__(self, request):
        super().__init__()
        self.trunk = Trunk(**{"width": 8, "blocks": 3, **request.overrides})
        self.out = nn.Linear(8, request.num_labels)
        CONFIG

    def forward(self, input_ids, attention_mask=None):
        hidden = self.trunk.tokens(input_ids)
        for layer in self.trunk.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.out(self.trunk.final(hidden)[:, 0]))


FAMILY = Family(
    name="toy", model_types=("toy-encoder",), base="trunk", embeddings=("tokens",), stacks={"blocks": "layers"},
    head=("final",), load=lambda request: Model(request), load_tokenizer=lambda name: "toy tokenizer",
)
'''

CHECK = """
import torch
from progscale.blocks import partition
from progscale.models import ModelRequest, build_meta, family_of, load_model, load_tokenizer
from progscale.plan import plan_for

explicit = {explicit!r}
request = ModelRequest({name!r}, head="sequence_classification", num_labels=3, overrides={{"blocks": 4}})
model = load_model(request, explicit)
family = family_of(model, explicit)
assert family.name == "toy", family
parts = partition(model, family)
assert parts.num_blocks == {{"blocks": 4}}
assert len(parts.names()) == len(list(model.parameters()))
assert parts.names("head") == ("trunk.final.weight", "trunk.final.bias", "out.weight", "out.bias"), parts.names("head")
assert model(torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 3)
assert partition(build_meta(request, explicit), family) == parts
assert load_tokenizer({name!r}, family=family) == "toy tokenizer"
plan = plan_for({name!r}, family=explicit, stages=2, overrides={{"blocks": 4}}, num_labels=3)
assert [stage.first_block["blocks"] for stage in plan.stages] == [0, 2]
print("plugged in")
"""


def run(folder: Path, code: str) -> str:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def install(folder: Path, value: str) -> None:
    """What a package installer leaves behind: the metadata with the entry point."""
    info = folder / "toy_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[progscale.families]\ntoy = {value}\n")


@pytest.mark.parametrize("value", ["toy_encoder.model:FAMILY", "toy_encoder.register"])
def test_an_installed_package(tmp_path: Path, value: str) -> None:
    package = tmp_path / "toy_encoder"
    package.mkdir()
    (package / "__init__.py").write_text("")
    # The model says its type, and so does the config in its folder: no family needs to be named.
    (package / "model.py").write_text(ENCODER.replace("CONFIG", "self.config = SimpleNamespace(model_type='toy-encoder')"))
    (package / "register.py").write_text(
        "from progscale.models.family import register_family\nfrom toy_encoder.model import FAMILY\nregister_family(FAMILY)\n"
    )
    install(tmp_path, value)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text('{"model_type": "toy-encoder"}')
    assert run(tmp_path, CHECK.format(explicit=None, name=str(weights))) == "plugged in"
    assert run(tmp_path, CHECK.format(explicit="toy", name="any name")) == "plugged in"


def test_a_plain_module(tmp_path: Path) -> None:
    (tmp_path / "my_encoder.py").write_text(ENCODER.replace("CONFIG", "pass") + "\nregister_family(FAMILY)\n")
    assert run(tmp_path, "import my_encoder\n" + CHECK.format(explicit="toy", name="any name")) == "plugged in"
