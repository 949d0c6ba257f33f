"""Modules import only what stands before them, the engines alone know Accelerate and DeepSpeed, and help needs no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "progscale"
# From what stands alone to what holds all together; each may import those before it.
ORDER = [
    *("errors", "checks", "numbers", "registry", "config", "schedule"),
    *("blocks", "models", "layers", "methods", "names", "cost", "plan", "paper"),
    *("estimate", "scale", "launcher", "machine", "owner", "network", "memory", "energy", "signals"),
    *("learning_rate", "optim", "optimizers", "engine"),
    *("preflight", "tasks", "data"),
    *("checkpoint", "resume", "verify", "watch"),
    *("compiling", "prefix", "cache", "fit"),
    *("meters", "trackers", "tracking", "export", "report", "publish"),
    *("joining", "session", "inputs", "folder", "setup", "progress", "loop", "run", "api", "doctor"),
    *("slurm", "submit", "suite", "contribution", "integrations", "cli", "__main__"),
]
WITHOUT_TORCH = (
    *("errors", "checks", "numbers", "registry", "config", "schedule", "names", "learning_rate"),
    *("launcher", "machine", "owner", "network", "signals", "report", "publish", "slurm", "submit", "suite", "cli"),
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    """`engine` for progscale/engine/local.py, `plan` for progscale/plan.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too; what only a type checker sees is no import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    typing_alone = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if isinstance(node, ast.If) and typing_alone else ast.iter_child_nodes(node):
        yield from imports(child)


def names_in(path: Path) -> list[str]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


def test_the_order_names_every_module() -> None:
    assert sorted({unit_of(path) for path in FILES}) == sorted(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_what_stands_before(path: Path) -> None:
    own = ORDER.index(unit_of(path))
    used = {name.split(".")[1] for name in names_in(path) if name.startswith("progscale.")}
    later = sorted(unit for unit in used - {"__version__"} if ORDER.index(unit) > own)
    assert later == [], f"{unit_of(path)} stands before {later}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_accelerate_and_deepspeed_are_known_to_the_engines_alone(path: Path) -> None:
    roots = {name.split(".")[0] for name in names_in(path)}
    if unit_of(path) != "engine":
        assert not roots & {"accelerate", "deepspeed"}


@pytest.mark.parametrize("unit", WITHOUT_TORCH)
def test_light_modules_name_no_torch(unit: str) -> None:
    for path in FILES:
        if unit_of(path) == unit:
            assert not {name.split(".")[0] for name in names_in(path)} & {"torch", "transformers", "numpy"}, path


def test_the_rule_sees_imports_wherever_they_stand() -> None:
    program = "if TYPE_CHECKING:\n import a\nelse:\n import b\ndef f():\n from c.d import e\ntry:\n import g\nfinally:\n pass"
    assert list(imports(ast.parse(program))) == ["b", "c.d.e", "g"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "accelerate launch launch/train.py"),
        (["train", "--help"], 0, "--set KEY=VALUE"),
        (["train", "--config", "missing.json"], 2, "missing.json"),
        (["train", "--set", "schedule.name=progtunning"], 2, "did you mean 'progtuning'"),
        (["train", "--set", "model.family=berd"], 2, "did you mean 'bert'"),
        (["train", "--set", "method.name=lora", "--set", "method.options.rnak=4"], 2, "did you mean 'rank'"),
        (["train", "--print-config"], 0, '"schedule"'),
        (["train", "--list-options"], 0, "optimizer.lr"),
        (["plan"], 2, "no model named"),
        (["submit", "--dry-run"], 0, "export PROGSCALE_HOME="),
        (["submit", "--nodes", "3"], 2, "32 rows cannot be shared equally by 3 processes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_answer_needs_no_torch(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    program = f"""
import json, sys, time
from progscale.cli import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
heavy = sorted({{"torch", "transformers", "datasets", "accelerate", "deepspeed", "numpy"}} & set(sys.modules))
print(json.dumps([code, heavy, time.process_time()]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    *shown, last = done.stderr.strip().splitlines()
    found, heavy, seconds = json.loads(last)
    assert (found, heavy) == (code, [])
    assert says in done.stdout + "\n".join(shown)
    # Of the processor, not of the clock: the machine may be busy.
    assert seconds < 2
