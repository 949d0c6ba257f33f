"""What a run folder holds, read back. Nothing here needs torch: a report can be made on any machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from progscale.errors import ReportError


@dataclass(frozen=True)
class RunRecord:
    """A run, finished or not.

    Attributes:
        path: its folder.
        config: config.json.
        plan: plan.json.
        summary: summary.json; None for a run that has not ended.
        records: the lines of metrics.jsonl, in their order.
    """

    path: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    records: Sequence[Mapping[str, Any]]

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """Records of one kind."""
        return [record for record in self.records if record.get("kind") == kind]

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary is not None

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What the run is and where it ran: from its summary, or what it said when it (last) began."""
        begun = self.of_kind("run")
        return self.summary if self.summary is not None else begun[-1] if begun else {}

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.resolve().name

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.plan["total_steps"])

    @property
    def step(self) -> int:
        """Optimizer steps that are known to be done."""
        if self.finished:
            return self.total_steps
        return max((int(record["step"]) for record in self.records if isinstance(record.get("step"), int)), default=0)

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """What each finished stage measured."""
        return self.of_kind("stage") if self.summary is None else list(self.summary["stages"])

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """Scores with the step that they were taken after."""
        return self.of_kind("evaluation")

    @property
    def primary_metric(self) -> str | None:
        """That decides which model is best; None for a run of an earlier version that does not say."""
        name = self.about.get("primary_metric")
        return None if name is None else str(name)

    def metrics(self, which: str = "last") -> Mapping[str, float]:
        """Scores after the last step ("last") or of the best evaluation ("best"); empty for a run that has not ended."""
        if self.summary is None:
            return {}
        found: Mapping[str, float] = self.summary["metrics" if which == "last" else "best_metrics"]
        return found


def read_run(path: str | Path) -> RunRecord:
    """Reads a run folder.

    Args:
        path: the folder, or a file in it.

    Raises:
        ReportError: it is no run folder, or a file in it is damaged.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.name in ("summary.json", "config.json", "metrics.jsonl", "plan.json", "report.html"):
        folder = folder.parent
    if not folder.is_dir():
        raise ReportError(f"'{folder}' is no folder; give that of a run, e.g. runs/demo-progtuning-42")
    config = _read_object(folder / "config.json", needed=True)
    plan = _read_object(folder / "plan.json", needed=True)
    assert config is not None
    assert plan is not None
    for key in ("stages", "total_steps", "num_blocks"):
        if key not in plan:
            raise ReportError(f"'{folder / 'plan.json'}' has no '{key}': it was not written by progscale train")
    return RunRecord(
        folder, config, plan, _read_object(folder / "summary.json", needed=False), _read_lines(folder / "metrics.jsonl")
    )


def _read_object(path: Path, *, needed: bool) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            raise ReportError(
                f"'{path.parent}' is no run folder: it has no {path.name}; give a folder that progscale train wrote, "
                "e.g. runs/demo-progtuning-42"
            ) from None
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ReportError(f"'{path}' holds no JSON object")
    return content


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
    """Records; a last line without its end is of a run that is being written, or was killed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ReportError(f"'{path}' cannot be read: {error}") from error
    lines = text.split("\n")
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"'{path}', line {number}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise ReportError(f"'{path}', line {number}: no JSON object")
        found.append(record)
    return found


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Run folders: those named, and those that lie below a folder which is none itself, without earlier runs of the same name.

    Returns:
        Runs to compare, and runs that were found and have not ended.

    Raises:
        ReportError: a path holds none.
    """
    found: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for path in map(Path, paths):
        path = path.expanduser()
        if (path / "config.json").exists() or not path.is_dir():
            found[path] = None
            continue
        # Exported models have a config.json too.
        here = sorted(entry.parent for entry in path.rglob("config.json") if (entry.parent / "plan.json").exists())
        here = [run for run in here if not was_moved_aside(run)]
        if not here:
            raise ReportError(f"'{path}' holds no run folder; give folders that progscale train wrote, e.g. runs/*")
        for run in here:
            (found if (run / "summary.json").exists() else unfinished)[run] = None
    return list(found), list(unfinished)


def was_moved_aside(run: Path) -> bool:
    """Whether a folder is an earlier run, NAME.1, of one that lies beside it."""
    name, _, number = run.name.rpartition(".")
    return number.isdigit() and (run.parent / name / "config.json").exists()
