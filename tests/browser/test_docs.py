"""The documentation in headless Chromium: no error, and nothing wider than a phone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.browser import open_page
from tests.harness.programs import REPOSITORY

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built without a warning."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", str(REPOSITORY / "docs"), str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def pages_of(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "_modules" not in path.parts and "_static" not in path.parts]


def test_every_page(window: Any, site: Path) -> None:
    pages = pages_of(site)
    assert len(pages) > 20
    for page in pages:
        open_page(window, page)
        assert window.get_log("browser") == [], page
        assert window.execute_script("return document.documentElement.scrollWidth <= innerWidth"), page
        broken = window.execute_script(
            "return [...document.images].filter((image) => image.complete && !image.naturalWidth).map((image) => image.src)"
        )
        assert broken == [], page


def test_options_and_commands_are_there(site: Path) -> None:
    from progscale.config.describe import describe_schema

    text = (site / "reference" / "config.html").read_text(encoding="utf-8")
    missing = [option.key for option in describe_schema() if option.key != "description" and f">{option.key}<" not in text]
    assert missing == []
    commands = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for command in ("train", "plan", "compare", "suite", "contribution", "checkpoint verify"):
        assert f'id="command-{command.replace(" ", "-")}"' in commands
