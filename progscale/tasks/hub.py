"""Data sets of the hub and of `datasets.save_to_disk`, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from progscale.errors import DataError, nearest
from progscale.tasks.files import Table


def load_hub(name: str, config: str | None = None) -> dict[str, Table]:
    """All labelled splits of a data set of the hub.

    Args:
        name: "owner/name", optionally with ":config" and "@revision" after it.
        config: the configuration where the name gives none.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    bare, _, revision = name.partition("@")
    bare, _, named_config = bare.partition(":")
    try:
        loaded = datasets.load_dataset(bare, named_config or config, revision=revision or None)
    except Exception as error:  # the hub, its cache and its file formats fail in too many ways to list
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"task.hub: the data set '{name}' cannot be loaded ({reason}); without a network set task.path to a local folder"
        ) from None
    return {split: as_table(data, f"{name}/{split}") for split, data in loaded.items()}


def load_disk(path: Path) -> dict[str, Table]:
    """The splits of a folder that `datasets.save_to_disk` wrote; a single data set is the split "train".

    Raises:
        DataError: it is damaged.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        return {split: as_table(data, f"{path}/{split}") for split, data in splits.items()}
    except Exception as error:  # a damaged folder raises whatever its arrow and JSON files raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not a readable folder of datasets.save_to_disk ({reason})") from None


def is_disk_folder(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def as_table(data: Any, name: str) -> Table:
    """A `datasets.Dataset` as a table, with the names of its ClassLabel columns."""
    names = {key: list(kind.names) for key, kind in data.features.items() if getattr(kind, "names", None)}
    columns = {key: data.with_format(None)[key][:] for key in data.column_names}
    return Table(name, columns, lambda row: f"row {row + 1}", class_names=names)


def pick_split(splits: dict[str, Table], wanted: str, name: str) -> Table:
    """A split by its name.

    Raises:
        DataError: no such split; the message lists those there are.
    """
    if wanted not in splits:
        raise DataError(f"{name} has no split '{wanted}' ({', '.join(splits)}){nearest(wanted, splits)}")
    return splits[wanted]
