"""What an engine does: build a stage, take a step, show its state. The loop knows nothing else of it.

An engine is built once for a run; each stage is built anew from its `StageBuild` (stage → trainable set → param groups →
engine), and the optimizer state of the surviving parameters is carried over.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import xxhash

from progscale.engine import ranks
from progscale.engine.counting import StepCounter
from progscale.engine.memory import peak_of
from progscale.engine.moving import redistribute
from progscale.engine.state import MASTER, Shard, Slice, deal, match_shards, move_shard, slices_of
from progscale.engine.terms import EngineSettings, LossFunction, MicroBatch, StepResult, Switch
from progscale.errors import ModelError
from progscale.layers import quantisation_tensors
from progscale.models.saving import persistent_buffers
from progscale.optim import StageBuild

T = TypeVar("T")

# The step of each stage that is counted, which costs Python's time for every operation: ZeRO-3 learns in the first what
# it need not gather twice, and a cache talks in the first two.
LOOK_AT = 3


class Engine(ABC):
    """Trains one stage at a time.

    Attributes:
        name: "plain", "ddp", "zero1", "zero2-offload", … as reports show it.
        module: the model itself, without any wrapper.
        build: the current stage's description.
        traffic: bytes of all collectives in the stage's third step (or its last) on this rank, see `StepCounter`; 0 where
            there is one rank, None before.
        operations: floating-point operations of the same step on this rank; None before it and after the next one.
        counts: whether they are counted.
    """

    name: str

    def __init__(self, module: torch.nn.Module, settings: EngineSettings, accelerator: Any) -> None:
        self.module = module
        self.settings = settings
        self.accelerator = accelerator
        self.build: StageBuild | None = None
        self._state_checked = False
        # Bytes that this rank hands to collectives in a step of the stage; None until one was taken.
        self.traffic: int | None = None
        self.operations: int | None = None
        self.counts = True
        self._steps_taken = self._look_at = 0
        # Names never change, the tensors behind them neither: looked up once.
        self.parameters: dict[str, torch.nn.Parameter] = dict(module.named_parameters())
        # Keys and values of a whole sequence are kept for what comes after it, and in training nothing does.
        self._no_cache = {"use_cache": False} if takes_cache(module) else {}

    # -- where we are ---------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Of this process among all."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Of the model on this rank."""
        return torch.device(self.accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    # -- stages ---------------------------------------------------------------------------------------------------

    def begin_stage(self, build: StageBuild, *, force: bool = False) -> Switch:
        """Builds the stage anew and carries surviving state over. A collective.

        Args:
            build: the stage's description.
            force: rebuild even when the trained tensors stay the same.
        """
        start = time.perf_counter()
        self.operations = None
        self._steps_taken, self._look_at = 0, min(LOOK_AT, build.stage.steps) if self.counts else 0
        if self._stays(build) and not force:
            self.build = build
            return Switch(False, time.perf_counter() - start, "none")
        first = self.build is None
        # What freezes need not stay in memory while the next stage is built.
        old = [] if first else [shard for shard in self.shards() if any(piece.name in build.live for piece in shard.pieces)]
        scale = None if first else self.scaler_state()
        if not first:
            self._release()
        self._set_trainable(build)
        self.build = build
        self.traffic = None if self.world_size > 1 else 0
        self._build(build)
        carried, requantized = self._carry(old)
        if scale is not None:
            self.load_scaler_state(scale)
        return Switch(True, time.perf_counter() - start, carried, requantized)

    def _stays(self, build: StageBuild) -> bool:
        """Whether what stands there is what `build` asks for."""
        return self.build is not None and self.build.groups == build.groups

    def _forget_prepared(self) -> None:
        """Lets Accelerate drop the old stage's model and optimizer, and collects the cycles that keep them alive."""
        # free_memory collects first and empties these lists after; the other way round one collection is enough.
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()
        self.accelerator.free_memory()

    def _set_trainable(self, build: StageBuild) -> None:
        live = build.live
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in live)
            parameter.grad = None

    def _carry(self, old: Sequence[Shard]) -> tuple[Literal["none", "shards", "slices"], int]:
        """How the state moved, and how many values were quantised anew."""
        new = self.shards()
        pairs = match_shards(old, new)
        # One rank alone cannot decide: the slice path is a collective.
        if self.all_true(pairs is not None):
            assert pairs is not None
            for source, target in pairs:
                move_shard(source, target)
            return "shards" if pairs else "none", 0
        carried = redistribute(old, new, device=self.device, distributed=self.world_size > 1)
        return "slices", self.over_partitions(carried.requantized)

    # -- a step ---------------------------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        weight: float,
        loss_function: LossFunction,
        learning_rate: float,
        notice: Callable[[], int] = lambda: 0,
        around: Callable[[Any], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> StepResult:
        """One optimizer step on one global batch. A collective.

        The gradient is the sum over the rows of the global batch divided by its weight (the number of rows, or of target
        tokens), whatever the split into ranks and micro-batches. It is checked on all ranks before any weight changes.

        Args:
            micro_batches: this rank's share; every rank has equally many.
            weight: of the global batch.
            loss_function: gives the loss of each row, float32, shape `(rows,)`.
            learning_rate: for this step.
            notice: a small number that this rank tells all others with the step's loss; asked for when the step's work
                has been given to the device.
            around: given a micro-batch, a context for its forward and backward pass.
        """
        self._steps_taken += 1
        self.operations = None
        if self._steps_taken != self._look_at:
            return self._train_step(micro_batches, weight, loss_function, learning_rate, notice, around)
        with StepCounter() as counter:
            result = self._train_step(micro_batches, weight, loss_function, learning_rate, notice, around)
        self.traffic, self.operations = counter.total, counter.operations
        return result

    def _train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        weight: float,
        loss_function: LossFunction,
        learning_rate: float,
        notice: Callable[[], int],
        around: Callable[[Any], contextlib.AbstractContextManager[None]],
    ) -> StepResult:
        total = torch.zeros((), device=self.device)
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self._accumulating(last), around(micro):
                outputs = self.forward(micro.inputs)
                loss = loss_function(outputs, self.to_device(micro.labels)).sum() * (micro.weight / weight)
                # Every engine averages over its ranks; the sum is wanted.
                self._backward(loss * self.world_size, last)
            total += loss.detach()
        return self._finish_step(total, learning_rate, notice)

    def _finish_step(self, total: torch.Tensor, learning_rate: float, notice: Callable[[], int]) -> StepResult:
        squared = self._gradient_norm_squared()
        numbers = torch.stack([total.double(), squared.double()])
        if self.world_size == 1:
            numbers = numbers.cpu()
        # All numbers of all ranks come to the CPU at once: it waits for the GPU once.
        reports = self._gather_numbers(torch.cat([numbers, numbers.new_full((1,), notice())]))
        loss = float(reports[:, 0].sum())
        grad_norm = float(self._combine_squared(reports[:, 1]).sqrt())
        notices = tuple(int(value) for value in reports[:, 2])
        bad_loss = [rank for rank, value in enumerate(reports[:, 0]) if not torch.isfinite(value)]
        fault: Literal["loss", "gradient"] | None
        bad_gradient = [rank for rank, value in enumerate(reports[:, 1]) if not torch.isfinite(value)]
        if bad_loss or (bad_gradient and not self._scale_can_fall()):
            self._discard()
            fault = "loss" if bad_loss else "gradient"
            return StepResult(loss, grad_norm, False, fault, tuple(bad_loss or bad_gradient), notices)
        applied = self._apply(learning_rate, grad_norm)
        if applied and not self._state_checked:
            # What an optimizer of somebody else keeps shows with its first step, and is wanted at the end of the stage.
            for shard in self.shards():
                shard.scalars()
            self._state_checked = True
        # Nothing but the loss scale may leave out a step whose gradient is finite.
        fault = None if applied or self.scales_loss else "gradient"
        return StepResult(loss, grad_norm, applied, fault, notices=notices)

    def trial(self, micro: MicroBatch, loss_function: LossFunction) -> int:
        """Bytes that a micro-batch needs at the peak of its forward and backward pass, gradients included; no trace is left.

        A collective.
        """
        with peak_of(self.device) as peak, self._accumulating(True):
            loss = loss_function(self.forward(micro.inputs), self.to_device(micro.labels)).mean()
            self._backward(loss, True)
            self._gradient_norm_squared()
        self._discard()
        return peak.bytes

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The model's outputs for one micro-batch, in the engine's precision."""
        with self._autocast():
            return self._wrapped()(**self.to_device(inputs), **self._no_cache)

    def run_until(self, inputs: Mapping[str, torch.Tensor], end: type[Exception]) -> None:
        """A forward pass without a graph that breaks off where `end` is raised in it.

        A collective where parameters are partitioned. It does not enter through what wraps the model, which has nothing to do
        where no gradient is wanted.
        """
        with torch.no_grad(), self._generating(), contextlib.suppress(end), self._breaking_off():
            self.module(**self.to_device(inputs), **self._no_cache)

    def _breaking_off(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass that may not come to its end: nothing of it is left behind."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Waits for the GPU, where there is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generate(self, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Token ids that the model writes after its prompt, shape `(rows, new tokens)`; padded where a row has ended.

        A collective where parameters are partitioned: every rank must call it equally often, and goes on until all are done.

        Args:
            inputs: prompts by name, padded on the left for a decoder.
            options: of `generate`, which come before those of the model's own generation config.

        Raises:
            ModelError: the model cannot generate.
        """
        module: Any = self.module
        if not hasattr(module, "generate"):
            raise ModelError(
                f"{type(module).__name__} has no `generate`, which this task's scores need; set task.generate to false"
            )
        together = self.partitions_parameters and self.world_size > 1
        # A compiled block would need a graph for each length.
        with self._generating(), torch.compiler.set_stance("force_eager"):
            # One text a row, as a tensor, whatever the published generation config asks for.
            plain = {"return_dict_in_generate": False, "num_return_sequences": 1, "use_cache": True}
            written = module.generate(**self.to_device(inputs), synced_gpus=together, **plain, **options)
        # A decoder alone gives its prompt back too.
        return written if module.config.is_encoder_decoder else written[:, inputs["input_ids"].shape[1] :]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off, no graph; training mode comes back after."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    # -- what others may see --------------------------------------------------------------------------------------

    @abstractmethod
    def shards(self) -> list[Shard]:
        """What the optimizer steps on this rank, with its state; views, no copies."""

    def updated_volume(self) -> int:
        """Σ over the optimizer's tensors of their true elements times the steps it has taken on them, over all ranks.

        This is the measured side of the ledger: it reads the optimizer's own step counters. A collective.
        """
        return self.over_partitions(sum(shard.numel * shard.step for shard in self.shards()))

    def optimizer_state_bytes(self) -> int:
        """Bytes of moments and of fp32 masters beside the parameters, on the rank that holds most. A collective."""
        return int(max(self.gather_objects(self._local_state_bytes())))

    def missing_state_bytes(self) -> int:
        """Of the optimizer's moments that come with the first step, where this rank computes."""
        width, shards = self.settings.optimizer.state_bytes_per_element, self.shards()
        here = [shard for shard in shards if shard.tensor.device.type == self.device.type]
        return sum(max(0, math.ceil(shard.tensor.numel() * width) - shard.state_bytes()) for shard in here)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """A 128-bit hash (XXH3) of the bits that this rank holds of each named parameter."""
        return {name: digest(self._local_tensor(name)) for name in names}

    @abstractmethod
    def full_parameters(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Whole parameters one by one, on the CPU of the main process, None elsewhere. A collective under ZeRO-3."""

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def own_slices(self) -> Iterator[Slice]:
        """What this rank stores: views of its optimizer's shards, and of the frozen parameters and buffers that it holds.

        Over all ranks every element comes once; what several ranks hold is shared out among them.
        """
        assert self.build is not None
        live, frozen = list(slices_of(self.shards())), [name for name in self.parameters if name not in self.build.live]
        yield from live if self.partitions_state else deal(live, self.rank, self.world_size)
        held = self._slices_held(frozen)
        yield from held if self.partitions_parameters else deal(held, self.rank, self.world_size)
        if self.is_main:
            yield from self._slices_held(self.buffers)

    def _slices_held(self, names: Iterable[str]) -> list[Slice]:
        ranges = [(name, *self.held(name)) for name in names]
        return [Slice(name, start, start + flat.numel(), {MASTER: flat}, {}) for name, start, flat in ranges]

    def held(self, name: str) -> tuple[int, torch.Tensor]:
        """What this rank holds of a parameter or buffer: the first element, and a flat view of the rest of its range."""
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name]
        return 0, tensor.detach().view(-1)

    def state_is_finite(self) -> bool:
        """Whether all weights, masters and moments of all ranks are finite. Reads them all; a collective."""
        tensors = [self.held(name)[1] for name in self.parameters]
        for shard in self.shards():
            tensors += [shard.tensor, *(value for value in shard.state.values() if isinstance(value, torch.Tensor))]
        # No mask as large as a shard: the extremes are NaN where an element is.
        extremes = [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor.detach())]
        return not self.any_true(not all(bool(extreme.isfinite()) for extreme in extremes))

    def sizes(self) -> dict[str, int]:
        """Elements of every whole parameter and buffer that a checkpoint has, also where this rank holds only a part."""
        buffers = {name: buffer.numel() for name, buffer in self.buffers.items()}
        return {name: self._numel(parameter) for name, parameter in self.parameters.items()} | buffers

    def _numel(self, parameter: torch.nn.Parameter) -> int:
        return parameter.numel()

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What else belongs to the model's saved state: running statistics, scales of quantised weights."""
        found = persistent_buffers(self.module)
        for prefix, child in self.module.named_modules():
            found |= {f"{prefix}.{key}": tensor for key, tensor in quantisation_tensors(child)}
        return found

    # -- talk between ranks ---------------------------------------------------------------------------------------

    def gather_objects(self, thing: Any) -> list[Any]:
        """`thing` of every rank, in the order of ranks. A collective."""
        return ranks.gather_objects(thing)

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives on the main process, on every rank; its error is raised on all. A collective."""
        return self.gather_objects(ranks.on_main(action))[0]

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank. A collective."""
        return all(self.gather_objects(flag))

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; cheaper than `all_true`. A collective."""
        return bool(self._gather_numbers(torch.tensor([float(flag)])).any())

    def barrier(self) -> None:
        """Waits for all ranks."""
        ranks.barrier()

    def to_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors on this rank's device."""
        return {key: value.to(self.device, non_blocking=True) for key, value in tensors.items()}

    def _gather_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return numbers.cpu()[None]
        numbers = numbers.to(self.device)
        gathered = torch.empty(self.world_size * numbers.numel(), dtype=numbers.dtype, device=self.device)
        dist.all_gather_into_tensor(gathered, numbers)
        return gathered.view(self.world_size, -1).cpu()

    # -- what an engine must say ----------------------------------------------------------------------------------

    scales_loss: bool = False
    partitions_state: bool = False
    partitions_parameters: bool = False

    @abstractmethod
    def _wrapped(self) -> Callable[..., Any]:
        """What the forward pass must enter through."""

    @abstractmethod
    def _build(self, build: StageBuild) -> None:
        """Makes optimizer and wrapper for the stage."""

    @abstractmethod
    def _release(self) -> None:
        """Lets go of the old stage's optimizer and wrapper, so that nothing of them stays alive."""

    @abstractmethod
    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; only the last one may communicate."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor, last: bool) -> None: ...

    @abstractmethod
    def _gradient_norm_squared(self) -> torch.Tensor:
        """Of the gradient that this rank will step with, before clipping."""

    @abstractmethod
    def _discard(self) -> None:
        """Drops the gradient, as if the batch had never been."""

    @abstractmethod
    def _apply(self, learning_rate: float, grad_norm: float) -> bool:
        """Clips and steps; returns whether the weights were updated."""

    def _combine_squared(self, by_rank: torch.Tensor) -> torch.Tensor:
        return by_rank.sum() if self.partitions_state else by_rank[0]

    def over_partitions(self, count: int) -> int:
        """A count of this rank's shards summed over all ranks, those that hold the same once. A collective."""
        return sum(self.gather_objects(count)) if self.partitions_state else count

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _generating(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of `generate`, which does not enter through the wrapped model."""
        return self._autocast()

    def _local_tensor(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach()

    def _local_state_bytes(self) -> int:
        return sum(shard.state_bytes() for shard in self.shards())

    def _scale_can_fall(self) -> bool:
        """Whether a gradient that is not finite may be the loss scale's doing, which then falls and the step is left out."""
        return False

    def scaler_state(self) -> dict[str, Any] | None:
        """The loss scale and what decides when it changes, as JSON values; None where no loss is scaled."""
        return None

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from the loss scale of another engine of the same kind; of another kind the scale alone is taken."""
        raise NotImplementedError(f"{self.name} scales no loss")

    def close(self) -> None:
        """Lets go of the last stage."""
        if self.build is not None:
            self._release()
            self.build = None


def takes_cache(module: Any) -> bool:
    """Whether a model's forward pass asks for `use_cache`, also that of one inside a PEFT model."""
    unwrapped = module.get_base_model() if hasattr(module, "get_base_model") else module
    return "use_cache" in inspect.signature(unwrapped.forward).parameters


def digest(tensor: torch.Tensor) -> str:
    """XXH3-128 of a tensor's bytes. Any flipped bit shows, whatever the dtype."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data) if flat.numel() else ""
