"""ROUGE (Lin 2004) of written texts, by the `rouge-score` package, which follows the original script."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L in percent, with stemming, the whole text as one sentence.

    The package knows words of the letters a to z and of digits alone: texts in other scripts score 0.

    Args:
        predictions: what was written.
        references: what should have been, as many and at least one.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}
