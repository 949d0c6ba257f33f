"""`progscale checkpoint verify`: is what lies there whole, and what is it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from progscale.checkpoint import reader
from progscale.checkpoint.state import check_state
from progscale.checkpoint.store import Store
from progscale.errors import RejectedError, printable
from progscale.resume import locate


@dataclass(frozen=True)
class Finding:
    """A checkpoint that was looked through.

    Attributes:
        path: its folder.
        reason: why it is rejected; None when every file has its hash and every parameter all its elements.
        step: optimizer steps done.
        stage: 1-based, the one at work.
        bytes: of all files.
        files: how many.
        engine: that wrote it.
        world_size: ranks that wrote it.
        parameters: elements of the model.
    """

    path: str
    reason: str | None = None
    step: int | None = None
    stage: int | None = None
    bytes: int | None = None
    files: int | None = None
    engine: str | None = None
    world_size: int | None = None
    parameters: int | None = None

    def to_json(self) -> dict[str, Any]:
        """With `valid` for scripts."""
        return {"valid": self.reason is None, **asdict(self)}


def verify_path(path: Path) -> list[Finding]:
    """Looks through a checkpoint, or all those of a run's folder, the newest first. No rank or model is needed.

    Raises:
        RejectedError: there is no checkpoint at all.
    """
    root, single = locate(path)
    return [look_through(found) for found in ([single] if single else Store(root).candidates())]


def look_through(path: Path) -> Finding:
    """Hashes every file, and checks that every parameter is whole."""
    try:
        checkpoint = reader.open_checkpoint(path)
        reader.verify(checkpoint)
        check_state(path, checkpoint.state)
    except RejectedError as error:
        return Finding(str(path), error.reason)
    state = checkpoint.state
    return Finding(
        path=str(path),
        step=checkpoint.step,
        stage=state.get("stage"),
        bytes=checkpoint.bytes,
        files=len(checkpoint.manifest.files),
        engine=state.get("engine"),
        world_size=state.get("world_size"),
        parameters=sum(state["parameters"].values()),
    )


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for people."""
    table = Table(title="Checkpoints", title_justify="left")
    for heading, side in (("checkpoint", "left"), ("verdict", "left"), ("step", "right"), ("stage", "right"), ("MB", "right")):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for heading in ("files", "parameters M", "written by"):
        table.add_column(heading, justify="right")
    for found in findings:
        if found.reason is not None:
            table.add_row(found.path, f"rejected: {found.reason}")
            continue
        assert found.bytes is not None and found.parameters is not None
        cells = (found.step, found.stage, f"{found.bytes / 1e6:.1f}", found.files, f"{found.parameters / 1e6:.2f}")
        table.add_row(found.path, "valid", *map(str, cells), f"{printable(str(found.engine))} × {found.world_size}")
    return table
