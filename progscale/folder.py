"""A run's folder before the run: what lies there, whether it is this run's, and what it goes on from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from progscale.checkpoint.store import Store
from progscale.config import Config, config_hash, decisive_values, dump_config
from progscale.errors import ConfigError, Fault, FinishedError, printable
from progscale.owner import hold
from progscale.plan import Plan
from progscale.resume import FOLDER as CHECKPOINTS
from progscale.resume import Resumed, same_value
from progscale.signals import PREEMPTED
from progscale.trackers import RunFolder


def open_folder(config: Config, plan: Plan, path: Path, resumed: Resumed | None, store: Store) -> RunFolder:
    """The run folder with config.json and plan.json in it; by the main process.

    Where the run goes on in it, half-written checkpoints are removed, and those that lie beyond the one it goes on from are
    put aside: they are damaged, or of a time that will not come again.
    """
    resume_bytes = None
    if resumed is not None:
        check_outside(path, resumed.checkpoint.path)
        if resumed.in_place:
            resume_bytes = int(resumed.checkpoint.state["metrics_bytes"])
    named = config.run.name is not None
    folder = RunFolder(path, dump_config(config), config_hash(config), named=named, resume_bytes=resume_bytes)
    folder.write("plan.json", plan.to_json())
    if resumed is not None:
        if resumed.in_place:
            (path / "summary.json").unlink(missing_ok=True)
            store.clean()
            for later in itertools.takewhile(lambda entry: not entry.samefile(resumed.checkpoint.path), store.candidates()):
                store.sideline(later)
        folder.record(
            "resume",
            step=resumed.checkpoint.step,
            path=str(resumed.checkpoint.path),
            saved_by={key: resumed.checkpoint.state[key] for key in ("engine", "world_size", "versions")},
            rejected=[str(error) for error in resumed.rejected],
        )
    return folder


def restore_replaced(path: Path) -> None:
    """Brings back the run's checkpoint that was being saved again when it was killed: there may be no other.

    Raises:
        ConfigError: another process is at work in the run's folder, and may be the one that replaces it.
    """
    store = Store(path / CHECKPOINTS)
    if store.replaced():
        held = hold(path)
        try:
            store.restore()
        finally:
            held.release()


def check_outside(path: Path, checkpoint: Path) -> None:
    """Refuses a run folder inside the checkpoint that is read.

    Raises:
        ConfigError: it is.
    """
    if path.resolve().is_relative_to(checkpoint.resolve()):
        raise ConfigError(Fault("run.output_dir", f"'{path}' lies inside the checkpoint to go on from; choose another"))


def check_unfinished(config: Config, path: Path) -> None:
    """Refuses to go on with a run that has ended.

    Raises:
        FinishedError: there is a summary of this very run.
    """
    if not (path / "summary.json").exists():
        return
    try:
        theirs = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    ours = dump_config(config)
    sections = {name: part for name, part in theirs.items() if isinstance(part, dict)} if isinstance(theirs, dict) else {}
    if all(same_value(sections.get(section, {}).get(key), ours[section][key]) for section, key in decisive_keys(config)):
        (path / PREEMPTED).unlink(missing_ok=True)  # of a signal while it was started: there is nothing to start again
        raise FinishedError(f"the run in {path} has ended: see summary.json there; without --resume it is made anew")


def decisive_keys(config: Config) -> list[tuple[str, str]]:
    """(section, key) of every option that decides what a run computes."""
    return [(section, name) for section, _, name in (key.partition(".") for key in decisive_values(config))]


def resume_line(resumed: Resumed | None, path: Path, total_steps: int) -> str:
    """What the user is told of the beginning."""
    if resumed is None:
        return f"no checkpoint to go on from in {path}: starting fresh"
    state = resumed.checkpoint.state
    by = f"{printable(state['engine'])} on {state['world_size']} {'process' if state['world_size'] == 1 else 'processes'}"
    return f"resuming from {resumed.checkpoint.path}: step {resumed.checkpoint.step} of {total_steps}, saved by {by}"


def unfinished(path: Path) -> str:
    """What to say of a run that was moved aside and could have gone on."""
    if (path / "summary.json").exists() or not Store(path / CHECKPOINTS).candidates():
        return ""
    return " (it was not finished: with --resume auto it would have gone on)"
