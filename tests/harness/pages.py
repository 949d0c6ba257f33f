"""Programs and configs that the documentation shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.harness.programs import REPOSITORY


def blocks(page: Path, language: str) -> list[str]:
    """What stands in a page's fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run_program(program: str, folder: Path) -> str:
    """Runs Python in a folder, in a process of its own; what it printed.

    Raises:
        AssertionError: it failed; with what it wrote on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
