"""What a run writes: the run folder and the console. Nothing here computes."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from progscale.data import MicroBatch
from progscale.errors import ConfigError, Fault
from progscale.owner import LOCK, OWNER, Hold, hold
from progscale.signals import PREEMPTED

PARTIAL = ".partial"

log = logging.getLogger("progscale")


class RunFolder:
    """The folder of one run: config.json, plan.json, metrics.jsonl, summary.json, model/.

    Args:
        path: `run.output_dir`/`run.name`.
        config: resolved, as a plain dict.
        config_hash: tells whether a folder that is there belongs to the same run.
        named: the user chose the name, so a run of another config in the folder is a mistake; else it is moved aside too.
        resume_bytes: go on with the run that lies there, whose metrics.jsonl had so many bytes; None begins a new one.

    Attributes:
        moved: where an earlier run that lay there is now.

    Raises:
        ConfigError: the folder holds a run of another config, is in use, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        config_hash: str,
        *,
        named: bool = True,
        resume_bytes: int | None = None,
    ) -> None:
        self.path = path
        self.moved: Path | None = None
        self._hold: Hold | None = None
        self._unwritten = bytearray()
        self._told = False
        try:
            if resume_bytes is None:
                self._claim(config_hash, named)
            path.mkdir(parents=True, exist_ok=True)
            self._hold = hold(path)
            check_no_links(path)
            if resume_bytes is not None:
                self._rewind(resume_bytes)
            (path / PREEMPTED).unlink(missing_ok=True)
            self.write("config.json", {"hash": config_hash, **config})
            # Unbuffered: what could not be written must be known, and not be tried again at some later time.
            self._metrics = (path / "metrics.jsonl").open("ab", buffering=0)
        except OSError as error:
            self._release()
            raise ConfigError(
                Fault(
                    "run.output_dir", f"'{path}' cannot be written ({error.strerror}); choose another with --set run.output_dir=…"
                )
            ) from error
        except ConfigError:
            self._release()
            raise

    def _claim(self, config_hash: str, named: bool) -> None:
        """Moves an earlier run aside; nothing is ever overwritten."""
        there = self.path / "config.json"
        if not there.exists():
            # A run that was told to stop before it began leaves its marker alone.
            if self.path.exists() and not all(is_of_a_beginning(entry.name) for entry in self.path.iterdir()):
                raise ConfigError(
                    Fault("run.name", f"'{self.path}' exists and is no run folder; choose another with --set run.name=…")
                )
            return
        try:
            owner = json.loads(there.read_text(encoding="utf-8"))["hash"]
        except (ValueError, TypeError, KeyError, RecursionError):
            owner = None  # damaged, or somebody else's config.json
        if owner is None or (named and owner != config_hash):
            other = "a config.json that is not a run's" if owner is None else "a run of another config"
            raise ConfigError(Fault("run.name", f"'{self.path}' holds {other}; choose another with --set run.name=…"))
        held = hold(self.path)
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, aside)
        (aside / OWNER).unlink(missing_ok=True)
        self.moved = aside
        held.release()

    def _rewind(self, size: int) -> None:
        """Cuts metrics.jsonl back to where it was at the checkpoint; what is cut off stays in a file beside it."""
        path = self.path / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        if len(content) > size:
            with (self.path / "metrics.discarded.jsonl").open("ab") as file:
                file.write(content[size:])
            with path.open("rb+") as file:
                file.truncate(size)

    def sync(self) -> int:
        """Sees metrics.jsonl onto the disk; returns its bytes."""
        self._write_records(sync=True)
        return os.fstat(self._metrics.fileno()).st_size

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON file whole or not at all."""
        target = self.path / name
        partial = target.with_name(target.name + PARTIAL)
        try:
            partial.write_text(json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def record(self, kind: str, **values: Any) -> None:
        """Adds a line to metrics.jsonl; one that cannot be written now is kept, and written with a later one."""
        line = {"kind": kind, "time": round(time.time(), 3), **values}
        self._unwritten += (json.dumps(without_nan(line), allow_nan=False) + "\n").encode()
        self._write_records()

    def _write_records(self, *, sync: bool = False) -> None:
        try:
            while self._unwritten:
                del self._unwritten[: self._metrics.write(self._unwritten)]
            if sync:
                os.fsync(self._metrics.fileno())
        except OSError as error:
            # A disk that is full may have room later, and no record is worth a run.
            if not self._told:
                log.warning("%s cannot be written (%s): records are kept until it can", self._metrics.name, error.strerror)
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Closes metrics.jsonl, and lets others have the folder; a second time it does nothing."""
        if self._unwritten:
            self._write_records()
        if self._unwritten:
            log.warning("%d bytes of records are lost: they could not be written to %s", len(self._unwritten), self._metrics.name)
            self._unwritten.clear()
        self._metrics.close()
        self._release()

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None


def is_of_a_beginning(name: str) -> bool:
    """Whether a file is left by a run that ended before its folder was one: told to stop, killed, or the disk was full."""
    return name in (PREEMPTED, LOCK, "config.json" + PARTIAL) or name.startswith((f".{PREEMPTED}.", OWNER))


def check_no_links(folder: Path) -> None:
    """Refuses a run folder whose own files are links: what is written to them would be written elsewhere.

    Raises:
        ConfigError: naming the first.
    """
    for entry in sorted(folder.iterdir()):
        # Checkpoints and models may lie on another disk; they are folders, and nothing is written over what is in them.
        if entry.is_symlink() and entry.name not in ("checkpoints", "model"):
            raise ConfigError(Fault("run.output_dir", f"'{entry}' is a link, and a run would write through it; remove it"))


def without_nan(value: Any) -> Any:
    """The value with null for NaN and infinity, which no JSON has and most readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return value


class RunConsole:
    """What a person sees: the plan before, a progress bar (or plain lines where there is no terminal), a table after.

    Args:
        is_main: only the main process prints.
        line_seconds: without a terminal, at most one line of progress in so many seconds.
    """

    def __init__(self, is_main: bool, line_seconds: float = 10.0) -> None:
        self._console = Console(
            file=sys.stdout,
            quiet=not is_main,
            # Text is shown as it is: names of files and labels may look like markup.
            markup=False,
            emoji=False,
            highlight=False,
            width=None if sys.stdout.isatty() else 120,
        )
        self._line_seconds = line_seconds
        self._last_line = 0.0
        self._progress: Progress | None = None
        self._task: Any = None
        self._total_steps = 0

    def show(self, thing: Any) -> None:
        """Prints a line as it is, a table or anything rich can render."""
        # A line of a log stays one, so that what it says can be searched for.
        self._console.print(thing, soft_wrap=isinstance(thing, str) and not self._console.is_terminal)

    def begin(self, total_steps: int, done: int = 0) -> None:
        """Starts the progress of the run, of which `done` steps were made before."""
        self._total_steps = total_steps
        # Even a quiet one would take over stderr.
        if self._console.is_terminal and not self._console.quiet:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=done, detail="")
            self._progress.start()

    def step(self, step: int, stage: int, loss: float, learning_rate: float) -> None:
        """Shows that optimizer step `step` (0-based) is done."""
        detail = f"stage {stage}  loss {loss:.4f}  lr {learning_rate:.2e}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, detail=detail)
        elif time.monotonic() - self._last_line >= self._line_seconds or step + 1 == self._total_steps:
            self._last_line = time.monotonic()
            self._console.print(f"step {step + 1}/{self._total_steps}  {detail}")

    def track(self, batches: Iterable[MicroBatch], rows: int, world_size: int) -> Iterator[MicroBatch]:
        """Passes an evaluation's batches on and shows how far it is: a second bar, or now and then a line.

        Args:
            batches: of this rank.
            rows: of the split, over all ranks.
            world_size: ranks; each is taken to be as far as this one.
        """
        bar = None if self._progress is None else self._progress.add_task("evaluation", total=rows, detail="")
        done, said = 0, time.monotonic()
        for batch in batches:
            yield batch
            done = min(rows, done + len(batch.rows) * world_size)
            if self._progress is not None and bar is not None:
                self._progress.update(bar, completed=done)
            elif time.monotonic() - said >= self._line_seconds:
                said = time.monotonic()
                self._console.print(f"evaluation: {done}/{rows} rows")
        if self._progress is not None and bar is not None:
            self._progress.remove_task(bar)

    def end(self) -> None:
        """Ends the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """The stages of a finished run, from the entries of summary.json."""
    table = Table(title="What each stage did", title_justify="left")
    headings = ("stage", "first block", "upd. M", "plan. M", "train s", "switch s", "audit s", "rows /s", "tokens /s")
    # Only where it tells something: the table is wide.
    several = any(entry.get("communicated_bytes") for entry in stages)
    for heading in (*headings, "peak MB", "optim. MB", *(["sent MB"] if several else []), "frozen moved"):
        table.add_column(heading, justify="right", min_width=5)
    for entry in stages:
        table.add_row(
            str(entry["stage"]),
            str(entry["first_block"]),
            f"{entry['updated_parameters'] / 1e6:.2f}",
            f"{entry['planned_updated_parameters'] / 1e6:.2f}",
            f"{entry['train_seconds']:.1f}",
            f"{entry['switch_seconds']:.2f}",
            f"{entry['audit_seconds']:.2f}",
            f"{entry['samples_per_second']:.0f}",
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['peak_memory_bytes'] / 1e6:.0f}",
            f"{entry['optimizer_state_bytes'] / 1e6:.1f}",
            *([f"{(entry.get('communicated_bytes') or 0) / 1e6:.1f}"] if several else []),
            str(entry["frozen_changed"]),
        )
    return table


def score_line(name: str, metrics: Mapping[str, float]) -> str:
    """One line for the scores of a split."""
    return f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
