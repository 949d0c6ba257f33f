"""SQuAD 1.1 and 2.0: the span of a passage that answers a question."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from progscale.errors import DataError, ModelError
from progscale.models.family import HeadKind
from progscale.tasks.base import Tokenized, register
from progscale.tasks.cache import cached, fingerprint_texts, fingerprint_tokenizer
from progscale.tasks.files import find_file
from progscale.tasks.hub import load_hub, pick_split
from progscale.tasks.metrics import choose_metric, own_scores
from progscale.tasks.ragged import Ragged
from progscale.tasks.squad_data import Questions, check_questions, encode_windows, from_hub_table, read_squad

if TYPE_CHECKING:
    import torch

HUBS = {"squad-v1": "rajpurkar/squad", "squad-v2": "rajpurkar/squad_v2"}
# Stands for the score of the best span where a question has none at all.
NO_SPAN = -1e4

log = logging.getLogger("progscale.data")

# (score of having no answer, [(first token, last token, score), …] best first); tokens count within the context.
Candidates = tuple[float, list[tuple[int, int, float]]]


@dataclass(frozen=True, eq=False)
class Windows:
    """What scoring needs beside the model's outputs.

    Attributes:
        questions: of the split.
        question: index of the question of each window.
        first: first context token of each window.
        cls: the CLS token of each window.
        spans: characters (begin, end) of each context token; empty for training data.
    """

    questions: Questions
    question: np.ndarray
    first: np.ndarray
    cls: np.ndarray
    spans: Ragged | None


class SquadTask:
    """Question answering by spans; a row is a window of a passage.

    `task.path` is the folder with the official files (`train-v1.1.json`, `dev-v1.1.json`, also `.json.gz`);
    `train_file` and `validation_file` name others. Without any of these the data comes from the hub.

    Args:
        config: the `task` section. `doc_stride` is the overlap of two windows in tokens; `no_answer_threshold` (2.0)
            is how much the score of no answer has to exceed that of the best span, "auto" takes 0; what the best
            threshold on these very data would give is in best_exact and best_f1.
        seed: of subsets.
        name: "squad-v1" or "squad-v2".

    Raises:
        DataError: a file is not there.
    """

    head: HeadKind = "question_answering"
    num_labels = 2
    label_names: tuple[str, ...] = ()
    problem_type: str | None = None

    def __init__(self, config: Any, *, seed: int = 0, name: str) -> None:
        self.name = name
        self.version_2 = name == "squad-v2"
        self.config = config
        self.seed = seed
        own: tuple[str, ...] = ("f1", "exact_match")
        if self.version_2:
            own += ("best_f1", "best_exact", "HasAns_f1", "HasAns_exact_match", "NoAns_f1", "NoAns_exact_match")
        self.primary_metric, self.higher_is_better, self._own_metric = choose_metric(self.config_value("metric"), own)
        threshold = self.config_value("no_answer_threshold", "auto")
        self.threshold = 0.0 if threshold == "auto" else float(threshold)
        self._files = self._find_files()
        self._splits: dict[str, Questions] | None = None

    def config_value(self, key: str, default: Any = None) -> Any:
        """An entry of the `task` section, or `default` where it is absent or null."""
        value = getattr(self.config, key, None)
        return default if value is None else value

    def _find_files(self) -> dict[str, Path]:
        path, names = self.config_value("path"), {}
        for split, key in (("train", "train_file"), ("validation", "validation_file")):
            if named := self.config_value(key):
                base = Path(os.path.expanduser(path)) if path else Path()
                names[split] = find_file(base / os.path.expanduser(named), f"task.{key}")
        if not path:
            if len(names) == 1:
                raise DataError("task: task.train_file and task.validation_file are both needed, or task.path")
            return names
        folder = find_file(path, "task.path")
        if not folder.is_dir():
            raise DataError(f"task.path: {folder} is a file; name the folder, or task.train_file and validation_file")
        version = "v2.0" if self.version_2 else "v1.1"
        for split, prefix in (("train", "train"), ("validation", "dev")):
            if split in names:
                continue
            found = sorted(entry for entry in folder.glob(f"{prefix}*.json*") if entry.suffix in (".json", ".gz"))
            found = [entry for entry in found if version in entry.name] or found
            if len(found) != 1:
                listed = ", ".join(sorted(entry.name for entry in found or folder.iterdir())[:10]) or "nothing"
                what = "several files" if found else "no file"
                raise DataError(f"task.path: {what} like {prefix}-{version}.json in {folder} ({listed})")
            names[split] = found[0]
        return names

    def splits(self) -> dict[str, Questions]:
        """The splits "train" and "validation", read once and cut to `max_train_examples` and `max_eval_examples`.

        Raises:
            DataError: what was read cannot be used.
        """
        if self._splits is None:
            if self._files:
                read = {split: read_squad(path) for split, path in self._files.items()}
            else:
                hub = self.config_value("hub", HUBS[self.name])
                tables = load_hub(hub)
                read = {split: from_hub_table(pick_split(tables, split, hub)) for split in ("train", "validation")}
            for split, questions in read.items():
                check_questions(questions, version_2=self.version_2)
                limit = self.config_value("max_train_examples" if split == "train" else "max_eval_examples")
                if limit is not None and limit < len(questions):
                    rng = np.random.default_rng([self.seed, 7])
                    read[split] = questions.take(np.sort(rng.permutation(len(questions))[:limit]))
            self._splits = read
        return self._splits

    def check(self) -> None:
        """Reads all of the data and tries the user's metric on a few right answers, without a tokenizer or a model.

        Raises:
            DataError: the first fault of the data.
            ConfigError: the metric fails.
        """
        questions = self.splits()["validation"]
        if self._own_metric:
            few = questions.take(np.arange(min(4, len(questions))))
            right = {key: (texts[0] if texts else "", 0.0) for key, texts in zip(few.ids, few.answers, strict=True)}
            own_scores(self._own_metric, self.primary_metric, self._common_format(right, few))

    def tokenize(self, tokenizer: Any, max_length: int) -> dict[str, Tokenized]:
        """The windows of both splits; kept on disk for the next run.

        Raises:
            DataError: the data cannot be used, or the stride does not fit the length.
            ModelError: the tokenizer is a slow one, which cannot say where a token stands in the text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{self.name} needs a fast tokenizer, for the place of each token in the text; "
                f"{type(tokenizer).__name__} is a slow one (is tokenizer.json missing beside the model?)"
            )
        stride = int(self.config_value("doc_stride", 128))
        result = {}
        for name, questions in self.splits().items():
            targets = name == "train"
            first = [(answers or [""])[0] for answers in questions.answers] if targets else None
            starts = [(starts or [-1])[0] for starts in questions.starts] if targets else []
            cache_key = {
                "kind": "squad",
                "content": fingerprint_texts(questions.questions, questions.contexts, first, list(map(str, starts))),
                "tokenizer": fingerprint_tokenizer(tokenizer),
                "max_length": max_length,
                "doc_stride": stride,
                "targets": targets,
            }
            build = partial(
                encode_windows,
                tokenizer,
                questions,
                max_length,
                stride,
                targets=targets,
                name=name,
            )
            arrays = cached(cache_key, build)
            if cut := int(arrays["cut"]):
                log.warning("%s: %d of %d questions are too long and lose their end", name, cut, len(questions))
            offsets = arrays["offsets"]
            inputs, targets_of = ("input_ids", "token_type_ids"), ("start_positions", "end_positions")
            columns: dict[str, Ragged] = {key: Ragged(arrays[key], offsets) for key in inputs if key in arrays}
            labels: dict[str, np.ndarray] = {key: arrays[key] for key in targets_of if key in arrays}
            spans = Ragged(arrays["spans"], arrays["span_offsets"]) if "spans" in arrays else None
            source = Windows(questions, arrays["question"], arrays["first"], arrays["cls"], spans)
            result[name] = Tokenized(columns, np.diff(offsets), labels, source)
        return result

    def loss(self, outputs: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean of the cross-entropies of start and end, of each row in float32, shape `(rows,)`."""
        from torch.nn import functional

        start = functional.cross_entropy(outputs.start_logits.float(), labels["start_positions"], reduction="none")
        end = functional.cross_entropy(outputs.end_logits.float(), labels["end_positions"], reduction="none")
        return (start + end) / 2

    def predict(self, outputs: Any, rows: Sequence[int], split: Tokenized) -> list[Candidates]:
        """The best spans of each window within its context, and its score of having no answer (at CLS)."""
        import torch

        source: Windows = split.source
        if source.spans is None:
            raise ValueError("training data has no character spans to predict for")
        start, end = outputs.start_logits.detach().float(), outputs.end_logits.detach().float()
        index = np.asarray(rows)
        place = partial(torch.as_tensor, device=start.device)
        first, count = place(source.first[index])[:, None], place(source.spans.lengths[index])[:, None]
        cls = place(source.cls[index])[:, None]
        null = (start.gather(1, cls) + end.gather(1, cls)).squeeze(1).cpu().tolist()
        tokens = torch.arange(start.shape[1], device=start.device)
        outside = (tokens < first) | (tokens >= first + count)
        kept = min(int(self.config_value("n_best", 20)), start.shape[1])
        start_scores, starts = start.masked_fill(outside, -torch.inf).topk(kept)
        end_scores, ends = end.masked_fill(outside, -torch.inf).topk(kept)
        scores = start_scores[:, :, None] + end_scores[:, None, :]
        length = ends[:, None, :] - starts[:, :, None] + 1
        allowed = (length >= 1) & (length <= int(self.config_value("max_answer_length", 30)))
        best, pair = scores.masked_fill(~allowed, -torch.inf).flatten(1).topk(kept)
        found = zip(
            null,
            (starts.gather(1, pair // kept) - first).cpu().tolist(),
            (ends.gather(1, pair % kept) - first).cpu().tolist(),
            best.cpu().tolist(),
            strict=True,
        )
        return [
            (nothing, [(s, e, score) for s, e, score in zip(*spans, strict=True) if score > -np.inf]) for nothing, *spans in found
        ]

    def answers(self, predictions: Mapping[int, Candidates], split: Tokenized) -> dict[str, tuple[str, float]]:
        """Question id → (text of the best span over its windows, score of no answer above that span's)."""
        source: Windows = split.source
        assert source.spans is not None
        questions = source.questions
        null = np.full(len(questions), np.inf)
        best = np.full(len(questions), NO_SPAN)
        texts = [""] * len(questions)
        for row in range(len(split)):
            question = int(source.question[row])
            nothing, candidates = predictions[row]
            null[question] = min(null[question], nothing)
            span = source.spans[row]
            for start, end, score in candidates:
                if score <= best[question]:
                    break
                # Some tokens stand for no character; the next best span is taken then.
                if text := questions.contexts[question][span[start, 0] : span[end, 1]].strip():
                    texts[question], best[question] = text, score
                    break
        return {key: (texts[i], float(null[i] - best[i])) for i, key in enumerate(questions.ids)}

    def score(self, predictions: Mapping[int, Any], split: Tokenized, name: str) -> dict[str, float]:
        """Official exact match and F1 in percent; for 2.0 also those of answerable and unanswerable questions."""
        from progscale.tasks.metrics.squad import SquadMetric

        found = self.answers(predictions, split)
        questions: Questions = split.source.questions
        version_2 = self.version_2
        result = SquadMetric(config_name="v2" if version_2 else "v1", keep_in_memory=True).compute(
            predictions=[
                {"id": key, "prediction_text": text} | ({"no_answer_score": above} if version_2 else {})
                for key, (text, above) in found.items()
            ],
            references=[{"id": key, "answers": texts} for key, texts in zip(questions.ids, questions.answers, strict=True)],
            threshold=self.threshold,
        )
        scores = {metric: float(value) for metric, value in (result or {}).items()}
        if self._own_metric:
            scores |= own_scores(self._own_metric, self.primary_metric, self._common_format(found, questions))
        return scores

    def _common_format(self, found: Mapping[str, tuple[str, float]], questions: Questions) -> dict[str, Any]:
        """Predictions and references as `evaluate`'s squad modules take them."""
        predictions: list[dict[str, Any]] = []
        for key, (text, above) in found.items():
            predictions.append({"id": key, "prediction_text": text})
            if self.version_2:
                refused = above > self.threshold
                predictions[-1] |= {"prediction_text": "" if refused else text, "no_answer_probability": float(refused)}
        references = [
            {"id": key, "answers": {"text": texts, "answer_start": starts}}
            for key, texts, starts in zip(questions.ids, questions.answers, questions.starts, strict=True)
        ]
        return {"predictions": predictions, "references": references}


for _name in HUBS:
    register(_name)(partial(SquadTask, name=_name))  # type: ignore[arg-type]
