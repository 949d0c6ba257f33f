"""What tasks over texts share, whatever is asked of the model: reading the splits once, cutting them, checking them."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from progscale.errors import DataError
from progscale.tasks.metrics import choose_metric


class Texts(Protocol):
    """One split before tokenising."""

    @property
    def texts(self) -> list[str]:
        """The first text of each example."""

    @property
    def pairs(self) -> list[str] | None:
        """The second one, or None where there is one text only."""

    @property
    def origin(self) -> str:
        """Where they come from, for messages."""

    def __len__(self) -> int: ...

    def take(self: T, rows: np.ndarray) -> T:
        """The given examples, in the order given."""


T = TypeVar("T", bound=Texts)


class ExampleTask(Generic[T]):
    """Base of the tasks whose examples are texts. A task says `metric_names` and defines `read`.

    Args:
        name: as registered.
        config: the `task` section.
        seed: of subsets and splits.
    """

    metric_names: tuple[str, ...] = ()

    def __init__(self, name: str, config: Any, *, seed: int = 0) -> None:
        self.name = name
        self.config = config
        self.seed = seed
        self.primary_metric, self.higher_is_better, self._own_metric = choose_metric(
            self.config_value("metric"), self.metric_names
        )
        self._splits: dict[str, T] | None = None

    def config_value(self, key: str, default: Any = None) -> Any:
        """An entry of the `task` section, or `default` where it is absent or null."""
        value = getattr(self.config, key, None)
        return default if value is None else value

    def read(self) -> dict[str, T]:
        """The splits before tokenising: "train" and those for evaluation."""
        raise NotImplementedError

    def splits(self) -> dict[str, T]:
        """The splits, read once and cut to `max_train_examples` and `max_eval_examples`.

        Raises:
            DataError: what was read cannot be used.
        """
        if self._splits is None:
            limits = (self.config_value("max_train_examples"), self.config_value("max_eval_examples"))
            self._splits = {name: subset(examples, limits[name != "train"], self.seed) for name, examples in self.read().items()}
            for name, examples in self._splits.items():
                if not len(examples):
                    raise DataError(f"{examples.origin}: no rows for {name}")
                check_encodable(examples)
        return self._splits

    def check(self) -> None:
        """Reads all of the data and tries the user's metric, without a tokenizer or a model.

        Raises:
            DataError: the first fault of the data.
            ConfigError: the metric fails.
        """
        self.splits()
        self.try_own_metric()

    def try_own_metric(self) -> None:
        """Lets the user's metric score a few right answers, so that one which does not fit fails now and not after an epoch."""


def subset(examples: T, limit: int | None, seed: int) -> T:
    """At most `limit` examples, drawn by the seed and left in their order (a file may be sorted by its labels)."""
    if limit is None or limit >= len(examples):
        return examples
    rows = np.sort(np.random.default_rng([seed, 7]).permutation(len(examples))[:limit])
    return examples.take(rows)


def check_encodable(examples: Texts) -> None:
    r"""Raises DataError for a text that is no valid Unicode (JSON allows half of a pair, `"\ud800"`)."""
    for column in (examples.texts, examples.pairs or []):
        try:
            "".join(column).encode()
        except UnicodeEncodeError:
            for i, text in enumerate(column):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    character = text[error.start]
                    message = f"{examples.origin}: example {i} holds U+{ord(character):04X}, which is no character"
                    raise DataError(message) from None
