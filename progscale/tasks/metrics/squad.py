"""Exact match and F1 as the official SQuAD scripts define them, for versions 1.1 and 2.0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without (ASCII) punctuation, without articles, single spaces: in this order, as the scripts do."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(guess: str, gold: str) -> float:
    """1.0 when both are the same after normalising."""
    return float(normalize(guess) == normalize(gold))


def f1(guess: str, gold: str, *, version_2: bool = True) -> float:
    """Harmonic mean of precision and recall over words; two empty texts agree by the 2.0 script, not by the 1.1 one."""
    guess_words, gold_words = normalize(guess).split(), normalize(gold).split()
    if not guess_words or not gold_words:
        return float(version_2 and guess_words == gold_words)
    common = sum((Counter(guess_words) & Counter(gold_words)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(guess_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def _best(guess: str, golds: Sequence[str], version_2: bool) -> tuple[float, float]:
    """(exact, f1) against the gold answer that suits best."""
    if version_2:
        # The 2.0 script drops golds that normalise to nothing, and a question without golds has the empty answer.
        golds = [gold for gold in golds if normalize(gold)] or [""]
    return max(exact_match(guess, gold) for gold in golds), max(f1(guess, gold, version_2=version_2) for gold in golds)


def squad_scores(
    guesses: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    *,
    version_2: bool,
    null_scores: Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> dict[str, float]:
    """The official metrics in percent.

    Args:
        guesses: question id → answer text; "" for no answer.
        golds: question id → the right answers; none for a question that cannot be answered.
        version_2: count as the 2.0 script does.
        null_scores: question id → score of having no answer, greater where that is likelier.
        threshold: with `null_scores`: questions whose score lies above it are taken as having no answer.

    Returns:
        "exact_match" and "f1"; for 2.0 also HasAns_ and NoAns_ of both (where there are such questions), and with
        `null_scores` best_exact, best_f1 and their thresholds: what the best threshold on these very data would give.
    """
    raw = {question: _best(guesses[question], gold, version_2) for question, gold in golds.items()}
    if not version_2:
        return _means(raw.values())
    answerable = {question: bool(gold_texts) for question, gold_texts in golds.items()}
    applied = dict(raw)
    if null_scores is not None and threshold is not None:
        for question in raw:
            if null_scores[question] > threshold:
                right = float(not answerable[question])
                applied[question] = (right, right)
    result = _means(applied.values())
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        part = [applied[question] for question in applied if answerable[question] is wanted]
        if part:
            result |= {f"{prefix}_{name}": value for name, value in _means(part).items()}
    if null_scores is not None:
        for position, name in enumerate(("exact", "f1")):
            best, at = best_threshold({q: pair[position] for q, pair in raw.items()}, guesses, answerable, null_scores)
            result |= {f"best_{name}": best, f"best_{name}_threshold": at}
    return result


def best_threshold(
    scores: Mapping[str, float],
    guesses: Mapping[str, str],
    answerable: Mapping[str, bool],
    null_scores: Mapping[str, float],
) -> tuple[float, float]:
    """(score in percent, threshold): the highest mean that a threshold on the null score can give.

    As the 2.0 script: beginning with no question answered, questions are answered in the order of their null score.
    (The script takes probabilities and calls that beginning 0; here scores may be negative, so it lies below them all.)
    """
    current = float(sum(not value for value in answerable.values()))
    best, threshold = current, min(null_scores.values()) - 1.0
    for question in sorted(scores, key=lambda q: null_scores[q]):
        if answerable[question]:
            current += scores[question]
        elif guesses[question]:
            current -= 1
        if current > best:
            best, threshold = current, null_scores[question]
    return 100.0 * best / len(scores), threshold


def _means(pairs: Any) -> dict[str, float]:
    exact, overlap = zip(*pairs, strict=True)
    return {"exact_match": 100.0 * sum(exact) / len(exact), "f1": 100.0 * sum(overlap) / len(overlap)}


class SquadMetric(evaluate.Metric):  # type: ignore[misc]
    """Exact match and F1 of SQuAD; `config_name` is "v1" or "v2"."""

    def _info(self) -> evaluate.MetricInfo:
        guess: dict[str, Any] = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        if self.config_name == "v2":
            guess["no_answer_score"] = datasets.Value("float64")
        gold = {"id": datasets.Value("string"), "answers": datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=self.__class__.__doc__ or "",
            citation="",
            inputs_description="predictions: id, prediction_text, v2: no_answer_score; references: id, answers (texts)",
            features=datasets.Features({"predictions": guess, "references": gold}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], threshold: float | None = None) -> dict[str, float]:
        version_2 = self.config_name == "v2"
        return squad_scores(
            {row["id"]: row["prediction_text"] for row in predictions},
            {row["id"]: row["answers"] for row in references},
            version_2=version_2,
            null_scores={row["id"]: row["no_answer_score"] for row in predictions} if version_2 else None,
            threshold=threshold,
        )
