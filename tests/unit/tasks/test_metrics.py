"""Metrics against values worked out by hand from the official definitions."""

from __future__ import annotations

import math

import pytest

from progscale.tasks.metrics import higher_is_better
from progscale.tasks.metrics.glue import SentenceMetric
from progscale.tasks.metrics.squad import best_threshold, exact_match, f1, normalize, squad_scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, a dog; an Owl.", "cat dog owl"),
        ("theatre another", "theatre another"),
        ("a-b c_d", "ab cd"),
        ("the", ""),
        ("Ünïcode – “quoted”", "ünïcode – “quoted”"),
        ("U.S.A.", "usa"),
        ("tab\tand\u00a0space", "tab and space"),
        ("a.b", "ab"),
        # Punctuation goes before articles do, so what is left of "a!" is an article.
        ("a! b", "b"),
    ],
)
def test_normalising(text: str, normal: str) -> None:
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("guess", "gold", "exact", "overlap"),
    [
        ("the grey cat", "Grey cat!", 1.0, 1.0),
        ("grey cat sleeps", "grey cat", 0.0, 0.8),
        ("cat cat", "cat", 0.0, 2 / 3),
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("", "", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(guess: str, gold: str, exact: float, overlap: float) -> None:
    assert exact_match(guess, gold) == exact
    assert f1(guess, gold) == pytest.approx(overlap)


def test_two_texts_that_vanish_agree_in_version_2_alone() -> None:
    assert f1("the", "a") == 1.0
    assert f1("the", "a", version_2=False) == 0.0


def test_version_1_takes_the_best_of_several_golds() -> None:
    golds = {"q1": ["grey cat", "cat"], "q2": ["blue", "red bird"]}
    assert squad_scores({"q1": "the cat", "q2": "bird"}, golds, version_2=False) == pytest.approx(
        {"exact_match": 50.0, "f1": 100 * (1 + 2 / 3) / 2}
    )


def test_version_2_by_hand() -> None:
    golds = {"has": ["cat"], "has2": ["red bird"], "no": [], "no2": []}
    guesses = {"has": "cat", "has2": "bird", "no": "dog", "no2": "fish"}
    null = {"has": -3.0, "has2": 1.0, "no": 2.0, "no2": -1.0}
    scores = squad_scores(guesses, golds, version_2=True, null_scores=null, threshold=0.0)
    # Above 0: has2 and no are taken as unanswerable.
    assert scores["exact_match"] == scores["f1"] == pytest.approx(100 * (1 + 0 + 1 + 0) / 4)
    assert (scores["HasAns_exact_match"], scores["NoAns_exact_match"]) == (50.0, 50.0)
    # Answering `has` alone is right on it and on both unanswerable questions: 3 of 4.
    assert (scores["best_exact"], scores["best_exact_threshold"]) == (75.0, -3.0)
    assert scores["best_f1"] == 75.0
    with_empty = squad_scores({**guesses, "no": "", "no2": ""}, golds, version_2=True)
    assert with_empty["NoAns_f1"] == 100.0 and "best_f1" not in with_empty
    assert "NoAns_f1" not in squad_scores({"has": "cat"}, {"has": ["cat"]}, version_2=True)


def test_the_best_threshold_may_refuse_every_question() -> None:
    best, threshold = best_threshold({"a": 0.0, "b": 0.0}, {"a": "x", "b": "y"}, {"a": False, "b": True}, {"a": -5.0, "b": -4.0})
    assert best == 50.0 and threshold < -5.0


def test_glue_metrics_by_hand() -> None:
    # 2 hits, 1 false alarm, 1 miss, 2 right refusals.
    truth, guesses = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    names = ("accuracy", "f1", "matthews_correlation")
    result = SentenceMetric.of(names).compute(predictions=guesses, references=truth)
    assert result == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "matthews_correlation": 3 / 9})
    numbers = ("pearson", "spearman", "mse", "mae")
    result = SentenceMetric.of(numbers).compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.0, 3.0])
    assert result == pytest.approx({"pearson": 3 / math.sqrt(2 * 14 / 3), "spearman": 1.0, "mse": 1 / 3, "mae": 1 / 3})


def test_f1_means_the_same_whatever_classes_occur() -> None:
    """Of three classes, an evaluation in which the third does not occur is still a mean over classes."""
    guesses = {"predictions": [0, 1, 1, 0], "references": [0, 1, 0, 0]}
    of_class_1, mean = 2 / 3, (0.8 + 2 / 3) / 2
    assert SentenceMetric.of(("f1",), 2).compute(**guesses)["f1"] == pytest.approx(of_class_1)
    assert SentenceMetric.of(("f1",)).compute(**guesses)["f1"] == pytest.approx(of_class_1)
    assert SentenceMetric.of(("f1",), 3).compute(**guesses)["f1"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("metric", "higher"), [("f1", True), ("mse", False), ("smape", False), ("hamming_loss", False), ("max_error", False)]
)
def test_which_way_is_better(metric: str, higher: bool) -> None:
    assert higher_is_better(metric) is higher


def test_more_than_two_classes_and_constant_predictions() -> None:
    result = SentenceMetric.of(("f1", "matthews_correlation")).compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 1])
    assert result["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert SentenceMetric.of(("matthews_correlation",)).compute(predictions=[1, 1], references=[0, 1]) == {
        "matthews_correlation": 0.0
    }
    constant = SentenceMetric.of(("pearson", "spearman")).compute(predictions=[1.0, 1.0], references=[0.0, 2.0])
    assert constant == {"pearson": 0.0, "spearman": 0.0}
