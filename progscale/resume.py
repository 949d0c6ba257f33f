"""Where a run goes on: which checkpoint is taken, and whether it belongs to this run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from progscale.blocks import Partition
from progscale.checkpoint.manifest import MANIFEST
from progscale.checkpoint.reader import Checkpoint, open_checkpoint, verify_together
from progscale.checkpoint.state import check_state
from progscale.checkpoint.store import NAME, Store
from progscale.config import Config, decisive_values
from progscale.engine import ranks
from progscale.errors import ConfigError, Fault, RejectedError, printable
from progscale.schedule import Stage
from progscale.tasks.base import Tokenized
from progscale.tasks.ragged import Ragged

FOLDER = "checkpoints"
POLICIES = ("auto", "never", "must")
# Entries of an identity that other entries decide.
STAGES, EPOCH, MODEL, DATA = "schedule's stages", "steps of an epoch", "model's parameters", "training data"
DERIVED = frozenset({STAGES, EPOCH, MODEL, DATA})


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    Attributes:
        checkpoint: verified.
        in_place: whether it lies in this run's own folder, whose records then go on.
        rejected: newer ones that cannot be used.
    """

    checkpoint: Checkpoint
    in_place: bool
    rejected: tuple[RejectedError, ...] = ()


def find_checkpoint(
    policy: str, run_folder: Path, identity: Mapping[str, Any], say: Callable[[str], None] = lambda text: None
) -> Resumed | None:
    """The newest valid checkpoint for a run. A collective.

    Args:
        policy: "auto" (start fresh where there is none), "must" (an error then), or the path of a checkpoint, or of the
            folder of a run.
        run_folder: of this run.
        identity: from `identity_of`.
        say: shows a line to the user.

    Raises:
        RejectedError: `policy` is a path and the checkpoint there is damaged; or "must", and there is none.
        ConfigError: the checkpoint is that of another run, with both values of what differs.
    """
    explicit = policy not in POLICIES
    root, single = locate(Path(policy)) if explicit else (run_folder / FOLDER, None)
    if single and lies_in(single, run_folder) and not is_own(single, run_folder):
        raise RejectedError(
            single,
            "left over or put aside in this run's own folder, which is tidied up: copy it elsewhere to go on from it",
        )
    paths = [single] if single else ranks.gather_objects(ranks.on_main(lambda: Store(root).candidates()))[0]
    rejected: list[RejectedError] = []
    for path in paths:
        try:
            ranks.on_main(lambda path=path: check_same_run(open_checkpoint(path), identity))  # type: ignore[misc]
            checkpoint = verify_together(path)
        except RejectedError as error:
            if single:
                raise
            rejected.append(error)
            say(f"rejected: {error}")
            continue
        return Resumed(checkpoint, is_own(path, run_folder), tuple(rejected))
    if policy == "auto":
        return None
    where = f"{len(rejected)} there, all of them rejected: {rejected[0]}" if rejected else "none there"
    raise RejectedError(root, f"--resume {policy} needs a valid checkpoint, and there is {where}")


def lies_in(path: Path, run_folder: Path) -> bool:
    """Whether a path lies somewhere in a run's folder."""
    return path.resolve().is_relative_to(run_folder.resolve())


def is_own(path: Path, run_folder: Path) -> bool:
    """Whether a folder is one of the checkpoints that a run counts as its own."""
    resolved = path.resolve()
    return resolved.parent == (run_folder / FOLDER).resolve() and NAME.fullmatch(resolved.name) is not None


def locate(path: Path) -> tuple[Path, Path | None]:
    """What a path given to --resume names: the folder that holds checkpoints, and the checkpoint where it is one.

    Raises:
        RejectedError: neither.
    """
    # Those of os.path take any text; Path's own fail for a name that is too long.
    if os.path.exists(path / MANIFEST):
        return path.parent, path
    for root in (path / FOLDER, path):
        if os.path.isdir(root) and Store(root).candidates():
            return root, None
    what = "there is no such folder" if not os.path.exists(path) else f"it has no {MANIFEST} and holds no checkpoints"
    raise RejectedError(path, f"{what}; --resume takes {', '.join(POLICIES)}, a checkpoint's folder, or a run's")


def identity_of(
    config: Config, partition: Partition, stages: Sequence[Stage], splits: Mapping[str, Tokenized], *, steps_per_epoch: int
) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values: options, stages, model and data."""
    name = config.model.name
    shapes = {info.name: list(info.shape) for info in partition.parameters.values()}
    return {
        **decisive_values(config),
        # A folder may lie elsewhere on the next machine: its content counts.
        "model.name": "a local folder" if name is not None and Path(name).expanduser().exists() else name,
        MODEL: f"{len(shapes)} tensors, {hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]}",
        STAGES: [stage_values(stage) for stage in stages],
        EPOCH: steps_per_epoch,
        DATA: f"{len(splits['train'])} rows, {fingerprint(splits['train'])}",
    }


def stage_values(stage: Stage) -> list[Any]:
    """A stage as JSON values: its steps, and the runs of live blocks of each stack."""
    live = {stack: _ranges(blocks) for stack, blocks in sorted(stage.live_blocks.items())}
    return [stage.start_step, stage.end_step, live, stage.embeddings]


def _ranges(blocks: Sequence[int]) -> str:
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block - 1:
            found[-1][1] = block
        else:
            found.append([block, block])
    return ",".join(f"{first}-{last}" for first, last in found)


def fingerprint(split: Tokenized) -> str:
    """A hash of a split's tokens and labels."""
    digest = xxhash.xxh3_128()

    def update(values: Ragged | np.ndarray) -> None:
        if isinstance(values, Ragged):
            # Token ids fit in 32 bits, and a cache may keep them in fewer.
            for array in (values.values, values.offsets):
                digest.update(np.ascontiguousarray(array, dtype=np.int64).data)
        else:
            digest.update(np.ascontiguousarray(np.asarray(values)).data)

    for name, column in sorted(split.columns.items()):
        digest.update(name.encode())
        update(column)
    for name, labels in sorted(split.labels.items()):
        digest.update(name.encode())
        update(labels)
    return digest.hexdigest()[:16]


def check_same_run(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of a run that computes something else.

    Raises:
        ConfigError: with both values of each difference.
        RejectedError: its state.json lacks something, or contradicts itself.
    """
    theirs = check_state(checkpoint.path, checkpoint.state).run
    ours = json.loads(json.dumps(identity))
    different = [key for key in sorted({*theirs, *ours}) if not same_value(theirs.get(key), ours.get(key))]
    # What follows from other options is news only where they are alike (somebody's own schedule, other data).
    told = [key for key in different if key not in DERIVED] or different
    if told:
        faults = []
        for key in told:
            both = f"the checkpoint has {json.dumps(theirs.get(key))}, this run {json.dumps(ours.get(key))}"
            faults.append(Fault(printable(key), both))
        raise ConfigError(
            faults, f"--resume: {checkpoint.path} is of another run (restore these values, or start anew with --resume never)"
        )


def same_value(theirs: Any, ours: Any) -> bool:
    """Whether an option has one value in both; None and `{}` ask for nothing, like an option that an older release had not."""
    return (None if theirs == {} else theirs) == (None if ours == {} else ours)


def derive_stage(stages: Sequence[Stage], checkpoint: Checkpoint) -> Stage:
    """The stage that was at work, from the schedule and the step; it must be the one that the checkpoint names.

    Exactly on a boundary a checkpoint is that of the stage that ends there, all of whose steps are done.

    Raises:
        RejectedError: the two contradict each other.
    """
    possible = [stage for stage in stages if stage.start_step <= checkpoint.step <= stage.end_step]
    named = checkpoint.state.get("stage")
    for stage in possible:
        if stage.index == named:
            return stage
    allowed = " or ".join(str(stage.index) for stage in possible) or "none"
    raise RejectedError(checkpoint.path, f"it names stage {named!r} at step {checkpoint.step}, where the schedule has {allowed}")
