"""What a fine-tuning method says: which tensors it trains, how it changes the model to have them, and how they are saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from progscale.config import Config, Section
from progscale.errors import Fault
from progscale.models.family import Family, HeadKind
from progscale.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from progscale.blocks import Partition

# Their head is made for the task and begins with random weights, so every method trains it. That of a language model is part of
# what was pretrained.
FRESH_HEADS: tuple[HeadKind, ...] = ("sequence_classification", "question_answering")


class NoOptions(Section):
    """Of a method that takes none."""


@dataclass(frozen=True)
class Subject:
    """What a method is applied to.

    Attributes:
        family: of the model.
        head: of the model.
        base: where the model's own weights come from, as an exported adapter names them; None for random weights.
        precision: of the run, `train.precision`.
        drawn: parameters of the base model that its checkpoint lacks, so that they begin with random weights (a pooler).
        revision: hub revision of the base model.
    """

    family: Family
    head: HeadKind = "sequence_classification"
    base: str | None = None
    precision: str = "fp32"
    drawn: frozenset[str] = frozenset()
    revision: str | None = None

    @property
    def fresh_head(self) -> bool:
        """Whether the head was made for the task."""
        return self.head in FRESH_HEADS


OptionsT = TypeVar("OptionsT", bound=Section)


class Method(ABC, Generic[OptionsT]):
    """A fine-tuning method, applied to one model.

    A method of one's own needs `tensors` alone; `prepare` may add modules, and what a plain transformers model cannot hold is
    saved by `save` and read by `restore`.

    Attributes:
        name: as registered.
        Options: the schema of `method.options`.
        saves_whole: what is exported is a whole model, which `from_pretrained` loads.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Section]] = NoOptions
    saves_whole: ClassVar[bool] = True

    def __init__(self, subject: Subject, options: OptionsT | None = None) -> None:
        self.subject = subject
        self.options = options if options is not None else cast(OptionsT, self.Options())

    @classmethod
    def refusals(cls, options: OptionsT, config: Config) -> list[Fault]:
        """Combinations with the rest of the config that cannot work, each with the reason. No model is loaded yet."""
        return []

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model to train; it may be `model` itself, changed or not. Called for a model without weights (meta) too.

        Raises:
            ModelError: the model has nothing that this method could train, or options do not fit it.
        """
        return model

    @abstractmethod
    def tensors(self, partition: Partition) -> frozenset[str]:
        """Names of the parameters that the method trains at most; a stage trains those of its live parts."""

    def exported(self, partition: Partition) -> frozenset[str]:
        """Names of the parameters that an export holds."""
        return frozenset(partition.parameters)

    def save(self, model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Writes the trained model to a folder.

        Args:
            model: as `prepare` made it; only its structure counts.
            state: the exported parameters and all persistent buffers, whole, on the CPU.
            folder: exists and is empty.
        """
        from progscale.models.saving import save_whole

        save_whole(model, state, folder)

    def restore(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """The trained model again, where `saves_whole` is false.

        Args:
            model: the base model as it is loaded, before `prepare`.
            folder: written by `save`.
        """
        raise NotImplementedError(f"method '{self.name}' exports whole models, which are loaded as such")

    def merge(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """A plain model with the trained weights of a folder merged into it; computes what the trained model computes.

        Args:
            model: the base model as it is loaded, before `prepare`.
            folder: written by `save`.

        Raises:
            ModelError: what was trained cannot be merged.
        """
        raise NotImplementedError(f"method '{self.name}' exports whole models, there is nothing to merge")


METHODS: Registry[type[Method[Any]]] = Registry("method", "progscale.methods", package="progscale.methods")
register = METHODS.register


def task_head(partition: Partition, subject: Subject) -> frozenset[str]:
    """Parameters of the head that was made for the task: those outside of the base model, and what a checkpoint lacked.

    Of a model that is its own base, what its family calls optional, or all of the head; of a language model none.
    """
    if not subject.fresh_head:
        return frozenset()
    head = partition.names("head")
    if partition.base:
        return frozenset(name for name in head if name in subject.drawn or not name.startswith(partition.base))
    return frozenset(name for name in head if partition.parameters[name].replaceable) or frozenset(head)
