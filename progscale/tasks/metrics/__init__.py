"""Metrics as `evaluate` modules: our own ones work without a network, a user's own one is loaded by name or path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from progscale.errors import ConfigError, Fault, nearest

LOWER_IS_BETTER = (
    "mse",
    "rmse",
    "mae",
    "mape",
    "smape",
    "mase",
    "error",
    "loss",
    "perplexity",
    "wer",
    "cer",
    "ter",
    "brier_score",
)


@lru_cache(maxsize=8)
def load_own(source: str) -> Any:
    """The `evaluate` module a user named: a script, its folder, or a name known to the hub.

    Raises:
        ConfigError: it cannot be loaded.
    """
    import evaluate

    path = os.path.expanduser(source)
    try:
        return evaluate.load(path if os.path.exists(path) else source, keep_in_memory=True)
    except Exception as error:  # the script is somebody else's code, and the hub fails in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            Fault("task.metric", f"evaluate:{source} cannot be loaded ({reason}); a path to its script works offline")
        ) from error


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric of this name is better."""
    return metric not in LOWER_IS_BETTER and not metric.endswith(("_loss", "_error"))


def choose_metric(wanted: str | None, own: tuple[str, ...]) -> tuple[str, bool, str | None]:
    """(primary metric, whether higher is better, name or path of a metric for `evaluate.load`) for `task.metric`.

    Raises:
        ConfigError: it is neither one of the task's metrics nor `evaluate:<name or path>`.
    """
    if wanted is None:
        wanted = own[0]
    if wanted.startswith("evaluate:"):
        source = wanted.removeprefix("evaluate:")
        primary = source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".py")
        if not primary:
            raise ConfigError(Fault("task.metric", "'evaluate:' needs the name or path of a metric after it"))
        load_own(source)
        return primary, higher_is_better(primary), source
    if wanted not in own:
        message = f"'{wanted}' is not a metric of this task ({', '.join(own)}) and does not begin with 'evaluate:'"
        raise ConfigError(Fault("task.metric", message + nearest(wanted, own)))
    return wanted, higher_is_better(wanted), None


def own_scores(
    source: str, primary: str, inputs: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """The numbers that the user's own metric gives; where there is one only, it gets the name `primary`.

    Args:
        source: name or path for `evaluate.load`.
        primary: the number that has to be among them.
        inputs: what every metric takes ("predictions", "references").
        optional: given in place of the predictions to a metric that asks for it by name and for no predictions.

    Raises:
        ConfigError: the metric fails on these predictions, or it is not clear which of its numbers is meant.
    """
    metric = load_own(source)
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    given = dict(inputs)
    for name, values in (optional or {}).items():
        if name in features and "predictions" not in features:
            given.pop("predictions", None)
            given[name] = values
    try:
        result = metric.compute(**given) or {}
    except Exception as error:  # somebody else's code: whatever it raises is shown as its fault
        raise ConfigError(Fault("task.metric", f"evaluate:{source} failed: {type(error).__name__}: {error}")) from error
    numbers = {key: float(value) for key, value in result.items() if isinstance(value, int | float | np.number)}
    if primary not in numbers:
        if len(numbers) != 1:
            found = ", ".join(numbers) or "no number"
            raise ConfigError(Fault("task.metric", f"evaluate:{source} gives {found}; it has to give '{primary}'"))
        numbers = {primary: next(iter(numbers.values()))}
    return numbers
