"""launch/train.py, which leaves word of how each rank ended: a file in $PROGSCALE_EXITS, named by the rank, with its exit code.

A launcher returns 1 whatever its workers return, and does not always say what that was.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def note(code: int) -> None:
    """Writes the code down."""
    rank = os.environ.get("RANK", "0")
    (Path(os.environ["PROGSCALE_EXITS"]) / rank).write_text(str(code))


def main() -> int:
    """Trains."""
    leave = os._exit

    def note_and_leave(status: int) -> NoReturn:
        note(status)
        leave(status)

    os._exit = note_and_leave
    sys.path.pop(0)  # this file's folder, whose modules are not meant to be at the top
    from progscale.cli import main as progscale

    code = 1
    try:
        code = progscale(["train", *sys.argv[1:]])
    finally:
        note(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
