"""The metrics of GLUE, computed by scikit-learn and scipy."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import evaluate
import numpy as np

NUMBERS = ("pearson", "spearman", "mse", "mae")


class SentenceMetric(evaluate.Metric):  # type: ignore[misc]
    """Any of accuracy, f1, matthews_correlation (classes), pearson, spearman, mse, mae (numbers).

    f1 is that of class 1 where the task has two classes, else the unweighted mean over the classes. A correlation with
    constant predictions is not defined; it is given as 0, as scikit-learn does for Matthews.
    """

    @classmethod
    def of(cls, names: tuple[str, ...], classes: int = 0) -> SentenceMetric:
        """The module that gives these metrics for so many classes; 0 takes as many as the data show."""
        return cls(config_name="+".join(names) + (f":{classes}" if classes else ""), keep_in_memory=True)

    def _asked(self) -> tuple[list[str], int]:
        names, _, classes = self.config_name.partition(":")
        return names.split("+"), int(classes or 0)

    def _info(self) -> evaluate.MetricInfo:
        kind = "float64" if set(self._asked()[0]) & set(NUMBERS) else "int64"
        return evaluate.MetricInfo(
            description=self.__class__.__doc__ or "",
            citation="",
            inputs_description="predictions and references: a class id or a number for each example",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        guesses, truth = np.asarray(predictions), np.asarray(references)
        names, classes = self._asked()
        # Which ids happen to occur in an evaluation must not decide what its F1 means.
        classes = classes or int(max(truth.max(), guesses.max())) + 1
        return {name: float(_f1(truth, guesses, classes) if name == "f1" else _METRICS[name](truth, guesses)) for name in names}


def _accuracy(truth: np.ndarray, guesses: np.ndarray) -> float:
    return float((truth == guesses).mean())


def _f1(truth: np.ndarray, guesses: np.ndarray, classes: int) -> float:
    from sklearn.metrics import f1_score

    return f1_score(truth, guesses, average="binary" if classes <= 2 else "macro", zero_division=0)


def _matthews(truth: np.ndarray, guesses: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return matthews_corrcoef(truth, guesses)


def _correlation(kind: str, truth: np.ndarray, guesses: np.ndarray) -> float:
    import scipy.stats

    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(guesses) == 0:
        return 0.0
    return getattr(scipy.stats, kind)(truth, guesses).statistic


_METRICS = {
    "accuracy": _accuracy,
    "matthews_correlation": _matthews,
    "pearson": lambda truth, guesses: _correlation("pearsonr", truth, guesses),
    "spearman": lambda truth, guesses: _correlation("spearmanr", truth, guesses),
    "mse": lambda truth, guesses: np.square(truth - guesses).mean(),
    "mae": lambda truth, guesses: np.abs(truth - guesses).mean(),
}
