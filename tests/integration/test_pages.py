"""What the documentation shows is so: its modules and commands run, its configs load, its pictures come from the code."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from progscale.config import load_config
from tests.harness.pages import blocks, run_program
from tests.harness.programs import REPOSITORY

DOCS = REPOSITORY / "docs"
# Imports once and runs all commands; each says its exit code.
DRIVER = """
import json, sys
from progscale.cli import main
sys.path.insert(0, "")
for command in json.load(open("commands.json")):
    print("ENDED", main(command), flush=True)
"""


def plugin_commands(page: Path) -> list[list[str]]:
    """Commands of a page that name a module of the reader's, and nothing that only the reader has."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if "--plugin" in line]
    return [shlex.split(line, comments=True) for line in lines if "FOLDER" not in line]


def test_modules_and_commands_of_the_how_to_pages(tmp_path: Path) -> None:
    commands = []
    for page in sorted((DOCS / "how-to").glob("*.md")):
        for program in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", program):
                (tmp_path / named[1]).write_text(program, encoding="utf-8")
        for program, *arguments in plugin_commands(page):
            assert program == "progscale"
            few = ["--set", "task.max_train_examples=64", "--set", f"run.name=run{len(commands)}"]
            commands.append(arguments + few if arguments[0] == "train" else arguments)
    assert len(commands) >= 4
    assert len({command[command.index("--plugin") + 1] for command in commands}) >= 3
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    said = run_program(DRIVER, tmp_path)
    assert re.findall(r"^ENDED (\d+)", said, re.M) == ["0"] * len(commands), said
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/summary.json"))]
    assert {"every_second", "norms", "some_norms"} <= {run["schedule"] for run in runs} | {run["method"] for run in runs}


CONFIGS = [
    (page.relative_to(REPOSITORY).as_posix(), text)
    for page in [REPOSITORY / "README.md", DOCS / "quick-start.md", *sorted((DOCS / "how-to").glob("*.md"))]
    for text in blocks(page, "json")
]


@pytest.mark.parametrize(("page", "text"), CONFIGS)
def test_configs_of_a_page_load(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "my_run.json").write_text(text, encoding="utf-8")
    load_config([tmp_path / "my_run.json"])


def test_the_pictures_are_those_of_the_code(tmp_path: Path) -> None:
    drawn = runpy.run_path(str(DOCS / "images" / "draw.py"))
    names = set(drawn["PICTURES"])
    assert names == {path.stem for path in (DOCS / "images").glob("*.svg")}
    for name in names:
        assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == str(drawn["PICTURES"][name]()), (
            "draw them again: python docs/images/draw.py"
        )


def test_every_schedule_has_its_picture() -> None:
    from progscale.schedule import SCHEDULES

    drawn = runpy.run_path(str(DOCS / "images" / "draw.py"))
    shipped = {name for name in SCHEDULES.names() if SCHEDULES.get(name).__module__ == "progscale.schedule"}
    assert set(drawn["SCHEDULES"]) == shipped


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of docs/ are Sphinx's to check."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (REPOSITORY / target).exists(), target
