"""Batches: which rows make a global batch, which rank runs which of them, and the padded tensors it gets.

Global batches are formed first and are the same at any world size; only then are they split into micro-batches. The
order is a pure function of (seed, epoch), so that a position in it is all a resumed run needs.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from progscale.errors import DataError, ModelError
from progscale.signals import SIGNALS
from progscale.tasks.base import IGNORED, Tokenized, evaluate_task
from progscale.tasks.ragged import Ragged

# Rows are grouped by length among so many global batches: enough to find alike ones, few enough to stay random.
MEGA_BATCHES = 50
DECODER_INPUT = "decoder_input_ids"

__all__ = [
    "GlobalBatch",
    "MicroBatch",
    "TrainLoader",
    "collate",
    "eval_batches",
    "evaluate_task",
    "global_batches",
    "pad_values",
    "split_batch",
]


def global_batches(
    lengths: Sequence[int] | np.ndarray,
    global_batch_size: int,
    *,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
) -> list[np.ndarray]:
    """The rows of each global batch of an epoch; every row once, and only the last batch may be short.

    Args:
        lengths: tokens of each row, shape `(rows,)`.
        global_batch_size: rows of a batch over all ranks.
        seed: of the run.
        epoch: 0-based.
        group_by_length: put rows of like length together, within 50 batches drawn at random; the order of the batches
            is random either way.
    """
    lengths = np.asarray(lengths)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    # The short batch is cut off first: sorted with the others, it would always hold the shortest rows.
    full = len(order) - len(order) % global_batch_size
    batches: list[np.ndarray] = []
    mega = global_batch_size * MEGA_BATCHES
    for begin in range(0, full, mega):
        rows = order[begin : min(begin + mega, full)]
        if group_by_length:
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
        batches += np.split(rows, len(rows) // global_batch_size)
    if group_by_length:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    if full < len(order):
        batches.append(order[full:])
    return batches


def split_batch(
    rows: np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    *,
    world_size: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
    multiple_of: int = 1,
    min_tokens: int = 1,
    nodes: int = 1,
) -> list[list[np.ndarray]]:
    """The rows of a global batch by [micro step][rank].

    Every rank has equally many micro-batches, of like lengths in the same micro step, so that little is padded and the
    ranks finish together. Some may be empty where there are fewer rows than ranks.

    Args:
        rows: of the global batch.
        lengths: tokens of each row of the split, shape `(rows of the split,)`.
        world_size: ranks.
        micro_batch_size: rows of a micro-batch at most.
        max_tokens: padded tokens (rows × longest) of a micro-batch at most; a row longer than that stands alone.
        multiple_of: padded lengths are rounded up to a multiple.
        min_tokens: padded lengths at the least.
        nodes: on each of which as many ranks are: a row goes to the same one each time, as far as all ranks then have equally
            many.
    """
    rows = np.asarray(rows)
    lengths = np.asarray(lengths)
    # Longest first: what does not fit in memory fails at once. Ties by row number, whatever the order given.
    rows = rows[np.lexsort((rows, -lengths[rows]))]
    sizes = []
    if max_tokens is None:
        steps = -(-len(rows) // (world_size * micro_batch_size))
        bounds = [len(rows) * step // steps for step in range(steps + 1)] if steps else [0]
        sizes = np.diff(bounds).tolist()
    else:
        done = 0
        while done < len(rows):
            width = max(min_tokens, -(-int(lengths[rows[done]]) // multiple_of) * multiple_of)
            fit = max(1, min(micro_batch_size, max_tokens // width))
            sizes.append(min(fit * world_size, len(rows) - done))
            done += sizes[-1]
    steps_of_rows = np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []
    return [_deal(part, world_size, nodes) for part in steps_of_rows]


def _deal(rows: np.ndarray, world_size: int, nodes: int) -> list[np.ndarray]:
    """Rows in turn to the ranks, or to those of their node while it has room; equally many to each, up to one."""
    if nodes == 1:
        return [rows[rank::world_size] for rank in range(world_size)]
    local = world_size // nodes
    sizes = [len(rows[rank::world_size]) for rank in range(world_size)]
    room = [sum(sizes[node * local : (node + 1) * local]) for node in range(nodes)]
    homes = rows % nodes
    # The longest first, as they come: of a node's own rows those that stay are the ones that cost most to run again.
    stays = np.zeros(len(rows), dtype=bool)
    for node in range(nodes):
        stays[np.flatnonzero(homes == node)[: room[node]]] = True
    free = np.repeat(np.arange(nodes), [room[node] - int((stays & (homes == node)).sum()) for node in range(nodes)])
    homes = homes.copy()
    homes[~stays] = free
    dealt: list[np.ndarray] = []
    for node in range(nodes):
        own = rows[homes == node]
        dealt += [own[rank::local] for rank in range(local)]
    return dealt


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank runs at once.

    Attributes:
        inputs: model inputs by name, int64, shape `(rows, longest row)`, "attention_mask" among them.
        labels: targets by name, shape `(rows,)`, or `(rows, longest target)` with IGNORED where there is none.
        rows: row numbers in the split.
        weight: 1.0; 0.0 for a filler, run only because other ranks have a batch: its loss and predictions are dropped.
        tokens: real tokens, without padding; 0 for a filler.
        peers: row numbers of every rank's micro-batch of this micro step; empty where a rank runs a filler.
    """

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    rows: np.ndarray
    weight: float = 1.0
    tokens: int = 0
    peers: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        """Tokens of its longest row, padding to a multiple included."""
        return self.inputs["input_ids"].shape[1]

    def run_by_all(self) -> list[np.ndarray]:
        """Row numbers that each rank runs in this micro step, fillers included."""
        return [rows if len(rows) else self.peers[0][-1:] for rows in self.peers]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MicroBatch:
        """The same on a device."""
        inputs = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()}
        labels = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.labels.items()}
        return dataclasses.replace(self, inputs=inputs, labels=labels)

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory, which a GPU can read while it computes."""
        inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        labels = {name: tensor.pin_memory() for name, tensor in self.labels.items()}
        return dataclasses.replace(self, inputs=inputs, labels=labels)


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """One optimizer step's data, as one rank sees it.

    Attributes:
        micro_batches: of this rank; as many on every rank.
        size: rows of the global batch over all ranks.
        weight: what the loss is divided by: the rows, or the target tokens, of the global batch over all ranks.
        tokens: real tokens of the global batch over all ranks.
        index: of the step within its epoch, 0-based.
        rows: of the global batch over all ranks.
    """

    micro_batches: list[MicroBatch]
    size: int
    weight: int
    tokens: int
    index: int
    rows: np.ndarray

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and padded tokens of each micro-batch of this rank."""
        return [(len(micro.rows), micro.length) for micro in self.micro_batches]

    def pin_memory(self) -> GlobalBatch:
        """The same in page-locked memory."""
        return dataclasses.replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


def pad_values(tokenizer: Any, config: Any = None) -> dict[str, int]:
    """What stands in padded places, by model input, and for an encoder-decoder what its decoder begins with.

    Args:
        tokenizer: of the model.
        config: of the model; None for one that has none.

    Raises:
        ModelError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token: set pad_token in the model's tokenizer_config.json")
    values = {"input_ids": int(tokenizer.pad_token_id), "token_type_ids": int(tokenizer.pad_token_type_id)}
    start = getattr(config, "decoder_start_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    return values if start is None else {**values, DECODER_INPUT: int(start)}


def collate(
    split: Tokenized,
    rows: np.ndarray,
    pad: Mapping[str, int],
    *,
    multiple_of: int = 1,
    min_tokens: int = 1,
    weight: float = 1.0,
) -> MicroBatch:
    """The given rows as tensors, padded on the right to the longest of them.

    An encoder-decoder that is trained on sequences also gets its decoder's input: the labels, shifted to the right.

    Args:
        split: the data.
        rows: row numbers, at least one.
        pad: from `pad_values`; an input that is not there is padded with 0.
        multiple_of: round the length up to a multiple (8 suits tensor cores), but not above the split's longest row:
            the model may have no positions beyond.
        min_tokens: the length at the least.
        weight: 0.0 marks a filler.
    """

    def padded(column: Ragged, fill: int, at_least: int = 1) -> torch.Tensor:
        longest = int(column.lengths[rows].max())
        width = max(at_least, min(-(-longest // multiple_of) * multiple_of, int(column.lengths.max())))
        return torch.from_numpy(column.padded(rows, width, fill))

    inputs = {name: padded(column, pad.get(name, 0), min_tokens) for name, column in split.columns.items()}
    lengths, width = split.columns["input_ids"].lengths[rows], inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
    labels = {}
    for name, values in split.labels.items():
        if not isinstance(values, Ragged):
            labels[name] = torch.from_numpy(np.asarray(values)[rows])
            continue
        labels[name] = padded(values, IGNORED)
        if DECODER_INPUT in pad:
            inputs[DECODER_INPUT] = shift_right(labels[name], pad[DECODER_INPUT], pad["input_ids"])
    return MicroBatch(inputs, labels, rows, weight, int(split.lengths[rows].sum()) if weight else 0)


def shift_right(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """A decoder's input: each row one place to the right after the start token; ignored places become padding."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, pad)


class TrainLoader:
    """The global batches of each epoch, as this rank runs them.

    (seed, epoch, start) decides the order, whatever the world size, the number of workers, or where a run stopped.

    Args:
        split: training data.
        pad: from `pad_values`.
        global_batch_size: rows of an optimizer step over all ranks.
        micro_batch_size: rows of a micro-batch at most.
        max_tokens: padded tokens of a micro-batch at most.
        seed: of the run.
        world_size: ranks.
        rank: of this process.
        group_by_length: put rows of like length into a global batch.
        num_workers: processes that prepare batches ahead; 0 prepares them in this one.
        pin_memory: put batches into page-locked memory (where there is a GPU).
        multiple_of: round padded lengths up to a multiple.
        min_tokens: padded lengths at the least.
        nodes: among which a row is dealt to the same one each time, where that can be.

    Raises:
        DataError: there are fewer rows than one global batch.
    """

    def __init__(
        self,
        split: Tokenized,
        pad: Mapping[str, int],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        max_tokens: int | None = None,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        group_by_length: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        multiple_of: int = 1,
        min_tokens: int = 1,
        nodes: int = 1,
    ) -> None:
        if len(split) < global_batch_size:
            raise DataError(
                f"train has {len(split)} rows, fewer than one global batch: "
                f"train.global_batch_size is {global_batch_size}, at most {len(split)} will do"
            )
        self.split = split
        self.pad = dict(pad)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.multiple_of = multiple_of
        self.min_tokens = min_tokens
        self.nodes = nodes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, a short last batch included."""
        return -(-len(self.split) // self.global_batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """The global batches of an epoch, from the step `start` (0-based) on."""
        plan = global_batches(
            self.split.lengths,
            self.global_batch_size,
            seed=self.seed,
            epoch=epoch,
            group_by_length=self.group_by_length,
        )
        steps = _Steps(self, plan)
        if self.num_workers == 0:
            for index in range(start, len(plan)):
                batch = steps[index]
                yield batch.pin_memory() if self.pin_memory else batch
            return
        yield from DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, len(plan)),
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
            pin_memory=self.pin_memory,
            # Its own generator: by default the loader draws a seed from torch's, and dropout would differ with workers.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def build(self, rows: np.ndarray, index: int) -> GlobalBatch:
        """The part of a global batch that falls to this rank."""
        lengths = self.split.lengths
        micro_steps = split_batch(
            rows,
            lengths,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            max_tokens=self.max_tokens,
            multiple_of=self.multiple_of,
            min_tokens=self.min_tokens,
            nodes=self.nodes,
        )
        micro_batches = [
            _collate_or_fill(self.split, step, self.rank, self.pad, self.multiple_of, self.min_tokens) for step in micro_steps
        ]
        return GlobalBatch(micro_batches, len(rows), self.split.weight(rows), int(lengths[rows].sum()), index, rows)


class _Steps(Dataset[GlobalBatch]):
    """The steps of one epoch by index, for torch's DataLoader."""

    def __init__(self, loader: TrainLoader, plan: list[np.ndarray]) -> None:
        self.loader = loader
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> GlobalBatch:
        return self.loader.build(self.plan[index], index)


def _collate_or_fill(
    split: Tokenized, step: list[np.ndarray], rank: int, pad: Mapping[str, int], multiple_of: int, min_tokens: int
) -> MicroBatch:
    filler = len(step[rank]) == 0
    # Rows are dealt longest first, so the first rank has one; its last is the shortest of the step.
    rows, weight = (step[0][-1:], 0.0) if filler else (step[rank], 1.0)
    batch = collate(split, rows, pad, multiple_of=multiple_of, min_tokens=min_tokens, weight=weight)
    return dataclasses.replace(batch, peers=tuple(step))


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """A signal is for the run, which ends its workers itself: one that dies first would look like a fault."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def eval_batches(
    split: Tokenized,
    batch_size: int,
    world_size: int,
    rank: int,
    *,
    pad: Mapping[str, int],
    max_tokens: int | None = None,
    multiple_of: int = 1,
    min_tokens: int = 1,
    nodes: int = 1,
) -> Iterator[MicroBatch]:
    """The micro-batches of an evaluation split for this rank: as many on every rank, each row once overall.

    Args:
        split: the data.
        batch_size: rows of a micro-batch at most.
        world_size: ranks.
        rank: of this process.
        pad: from `pad_values`.
        max_tokens: padded tokens of a micro-batch at most.
        multiple_of: round padded lengths up to a multiple.
        min_tokens: padded lengths at the least.
        nodes: among which a row is dealt to the same one each time.
    """
    steps = split_batch(
        np.arange(len(split)),
        split.lengths,
        world_size=world_size,
        micro_batch_size=batch_size,
        max_tokens=max_tokens,
        multiple_of=multiple_of,
        min_tokens=min_tokens,
        nodes=nodes,
    )
    for step in steps:
        yield _collate_or_fill(split, step, rank, pad, multiple_of, min_tokens)
