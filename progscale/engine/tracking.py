"""Accelerate's trackers: a common face of TensorBoard, MLflow, Weights & Biases and trackio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """What is used of one."""

    @property
    def tracker(self) -> Any:
        """The service's own run object."""
        ...

    def start(self) -> None:
        """Begins the run there."""
        ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keeps the run's options."""
        ...

    def log(self, values: dict[str, Any], step: int | None) -> None:
        """Keeps figures of a step."""
        ...

    def finish(self) -> None:
        """Ends the run there."""
        ...


def make_tracker(name: str, project: str, folder: Path, options: Mapping[str, Any]) -> Tracker:
    """One of Accelerate's trackers, not begun.

    Args:
        name: as Accelerate has it ("tensorboard", "mlflow", "wandb", "trackio").
        project: under which the service keeps the run; of TensorBoard the folder's name.
        folder: for a service that writes files itself.
        options: what the service's own constructor takes.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    return kind(project, str(folder), **options) if kind.requires_logging_directory else kind(project, **options)
