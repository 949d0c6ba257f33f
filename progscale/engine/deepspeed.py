"""ZeRO 1, 2 and 3 through Accelerate, with and without optimizer offload. DeepSpeed's internals are known to this file alone.

A stage switch destroys the old DeepSpeed engine and builds a new one over the same module. Setting `requires_grad`
to False would not do: ZeRO fills a missing gradient with zeros, and momentum and weight decay go on moving the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch._tensor_str import printoptions

from progscale.config.deepspeed import nvme_folder, second_copies
from progscale.engine import ranks
from progscale.engine.base import Engine, EngineSettings
from progscale.engine.mapped import as_deepspeed_reads_it, give_back_pinned, is_mapped, to_file
from progscale.engine.state import Piece, Shard
from progscale.errors import UserError
from progscale.models.lookup import hidden_size
from progscale.optim import StageBuild

# What DeepSpeed leaves on parameters and modules when an engine is destroyed, and what then keeps the whole engine alive
# (0.18, 0.19). The module attributes are made once a module and close over the first engine.
_PARAMETER_LEFTOVERS = (
    *("_hp_mapping", "_z3_optimizer", "_zero_optimizer", "grad_accum", "comm_dtype"),
    *("_dp_group", "_index_in_param_group", "param_idx_in_group", "load_hp_checkpoint_state"),
    *("get_full_hp_grad", "get_full_hp_param", "set_full_hp_grad", "set_full_hp_param"),
)
# Of a loss scaler what changes with the steps; everything else is a setting.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_MODULE_LEFTOVERS = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


class DeepSpeedEngine(Engine):
    """Optimizer state, gradients and (ZeRO-3) parameters are partitioned over the ranks.

    Args:
        module: the model; under ZeRO-3 it may already be partitioned.
        settings: common to all engines.
        accelerator: made with a DeepSpeedPlugin.
        deepspeed: the user's literal DeepSpeed JSON, without the keys that are ours.
        of_stage: the same for each stage (1-based), where it differs; whether parameters are partitioned does not.
    """

    partitions_state = True

    def __init__(
        self,
        module: torch.nn.Module,
        settings: EngineSettings,
        accelerator: Any,
        deepspeed: Mapping[str, Any],
        of_stage: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(module, settings, accelerator)
        self._of_stage = of_stage or (lambda stage: deepspeed)
        self._take(deepspeed)
        # Parameters that are still whole are partitioned by the first stage's engine, in the group that stands there then.
        second_group(deepspeed)
        self.partitions_parameters = self.zero_stage == 3
        self.scales_loss = settings.precision == "fp16"
        self._engine: Any = None
        # The optimizer as Accelerate gives it out.
        self.prepared: Any = None
        for child in module.modules():
            # DeepSpeed moves no module that is partitioned already, and with it none of its buffers.
            for key, buffer in child._buffers.items():
                child._buffers[key] = None if buffer is None else buffer.to(self.device)
        check_release(
            version("deepspeed"),
            self.zero_stage,
            on_cpu=self.device.type == "cpu",
            checkpointing=any(getattr(child, "gradient_checkpointing", False) for child in module.modules()),
        )

    # -- stages ---------------------------------------------------------------------------------------------------

    def _take(self, deepspeed: Mapping[str, Any]) -> None:
        self.deepspeed = dict(deepspeed)
        zero = self.deepspeed["zero_optimization"]
        self.zero_stage = int(zero["stage"])
        self._folder = nvme_folder(self.deepspeed)
        self.offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        self.name = f"zero{self.zero_stage}" + ("-offload" if self.offloads else "")

    def _stays(self, build: StageBuild) -> bool:
        return super()._stays(build) and dict(self._of_stage(build.stage.index)) == self.deepspeed

    def _build(self, build: StageBuild) -> None:
        self._take(self._of_stage(build.stage.index))
        ranks.on_all(lambda: self._park(build))
        for name in self.parameters:
            # DeepSpeed drops second copies after a step of its own, and not when somebody else gave the partitions other values.
            if getattr(self.parameters[name], "ds_secondary_tensor", None) is not None:
                vars(self.parameters[name])["ds_secondary_tensor"] = None
        self._write_config()
        optimizer = self.settings.optimizer.build(self.parameters, build.groups)
        # ZeRO-3 formats its arguments for a log line that is not printed, all values of all parameters among them.
        with printoptions(threshold=0, edgeitems=1):
            self._engine, self.prepared = self.accelerator.prepare(self.module, optimizer)
        if self._folder is not None:
            # A model that was built whole is partitioned by the first engine.
            ranks.on_all(lambda: self._park(build))
            give_back_pinned()

    def _write_config(self) -> None:
        """Accelerate fills "auto" once and keeps the values; each stage writes the whole config anew."""
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        plugin = self.accelerator.state.deepspeed_plugin
        plugin.hf_ds_config = HfDeepSpeedConfig(
            stage_config(self.deepspeed, self.settings, self.world_size, hidden_size(self.module) or 1024)
        )
        plugin.deepspeed_config = plugin.hf_ds_config.config

    def _park(self, build: StageBuild) -> None:
        """Has what is frozen lie where it stays: in memory of its own, or in a file. One rank's disk alone may be full."""
        for name, parameter in self.parameters.items():
            if name in build.live:
                continue
            held = self._held(name)
            if self._folder is not None and hasattr(parameter, "ds_tensor"):
                to_file(held, self._folder)
            if not is_mapped(held):
                leave_flat_buffer(held)

    def _release(self) -> None:
        engine, self._engine, self.prepared = self._engine, None, None
        if engine is not None:  # None: it failed while it was built
            for value in list(vars(engine).values()):
                if type(value).__name__ == "RemovableHandle":
                    value.remove()
            engine.destroy()
            # `__del__` destroys again, when the next engine already stands on the same parameters.
            engine.destroy = lambda: None
        for parameter in self.parameters.values():
            parameter.grad = None
            for attribute in _PARAMETER_LEFTOVERS:
                parameter.__dict__.pop(attribute, None)
        for child in self.module.modules():
            for attribute in _MODULE_LEFTOVERS:
                child.__dict__.pop(attribute, None)
        if self.zero_stage == 3:
            forget_globals(self.module)
        # Accelerate would destroy the engine once more.
        self.accelerator.deepspeed_engine_wrapped = None
        del engine
        self._forget_prepared()

    # -- a step ---------------------------------------------------------------------------------------------------

    def _wrapped(self) -> Callable[..., Any]:
        return self._engine

    def _generating(self) -> contextlib.AbstractContextManager[Any]:
        # DeepSpeed's own autocast stands around its engine's forward pass alone.
        return torch.autocast(self.device.type, enabled=self.settings.precision == "bf16", dtype=torch.bfloat16)

    @contextlib.contextmanager
    def _breaking_off(self) -> Iterator[None]:
        from deepspeed.runtime.zero import parameter_offload

        # Each module puts itself here when it is entered, and takes itself off when it is left.
        stack = parameter_offload.FWD_MODULE_STACK
        height = len(stack)
        try:
            yield
        finally:
            del stack[height:]

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            # Off the boundary this only counts the micro-batch; releases before 0.19.8 were measured with it and without.
            self._engine.step()

    def _zero(self) -> Any:
        return self._engine.optimizer

    def _flats(self) -> list[Any]:
        """This rank's flat fp32 partitions, which the optimizer steps."""
        zero = self._zero()
        return list(zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups)

    def _gradients(self) -> list[torch.Tensor]:
        """This rank's reduced gradients at the boundary; each element lies on one rank, padding is 0."""
        if self.offloads:
            self._wait_for_copies()
            return [flat.grad for flat in self._flats()]
        return [tensor for group in self._zero().averaged_gradients.values() if group is not None for tensor in group]

    def _wait_for_copies(self) -> None:
        """On a GPU offloaded gradients are still on their way to pinned memory."""
        wait = getattr(self._zero(), "_wait_for_offload_copies", None)
        if wait is not None:
            wait()
        elif self.device.type == "cuda":  # before 0.19.8, and ZeRO-3
            torch.cuda.synchronize(self.device)

    def _gradient_norm_squared(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for gradient in self._gradients():
            total += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).square().to(self.device)
        scale = float(self._zero().loss_scale) if self.scales_loss else 1.0
        return total / scale**2

    def _discard(self) -> None:
        zero = self._zero()
        zero.zero_grad()
        zero._epilogue_ran_this_backward = False
        if self.zero_stage == 3:
            zero.micro_step_id = 0
            zero._offload_boundary_param_ids = set()
            zero.averaged_gradients = {}
            for bucket in zero.ipg_buckets.values():
                bucket.clear_params()
            zero._partition_all_parameters()
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        else:
            zero.micro_step_id = -1
            zero._offload_accumulated_param_ids = set()
            for key in list(zero.averaged_gradients):
                zero.averaged_gradients[key] = None
                zero.all_grad_tensors[key] = None
        if self.offloads:
            zero.reset_cpu_buffers()
        self._clear_gradients()

    def _apply(self, learning_rate: float, grad_norm: float) -> bool:
        for group in self._zero().param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if not applied and self.zero_stage < 3:
            # With offload and fp32 accumulation DeepSpeed would keep the overflow, and add the next gradients to it.
            self._discard()
        self._clear_gradients()
        return applied

    def _clear_gradients(self) -> None:
        """A live parameter that gets no gradient in the next step must not meet this step's (ZeRO-3, and offload)."""
        if self.zero_stage == 3:
            self._zero().grad_partitions_flat_buffer.zero_()
        if self.offloads:
            for flat in self._flats():
                if flat.grad is not None:
                    flat.grad.zero_()

    # -- state ----------------------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """This rank's flat fp32 partitions: one for each param group (ZeRO 1, 2) or sub-group (ZeRO 3)."""
        return self._shards_of_stage3() if self.zero_stage == 3 else self._shards_of_stage12()

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.parameters.items()}

    def _shards_of_stage12(self) -> list[Shard]:
        zero, names, shards = self._zero(), self._names(), []
        for index, parameters in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[index])
            first = self.rank * size
            offsets = _offsets(zero, index, parameters)
            pieces = []
            for parameter, offset in zip(parameters, offsets, strict=True):
                start, end = max(offset, first), min(offset + parameter.numel(), first + size)
                if start < end:
                    pieces.append(Piece(names[id(parameter)], start - offset, end - offset, start - first))
            flat = zero.single_partition_of_fp32_groups[index]
            shards.append(Shard(tuple(pieces), flat, zero.optimizer.state[flat], index, self.settings.optimizer))
        return shards

    def _shards_of_stage3(self) -> list[Shard]:
        zero, names, shards = self._zero(), self._names(), []
        for index, parameters in enumerate(zero.fp16_groups):
            pieces, offset = [], 0
            for parameter in parameters:
                size = int(parameter.partition_numel())
                start = self.rank * size
                end = min(start + size, int(parameter.ds_numel))
                if start < end:
                    pieces.append(Piece(names[id(parameter)], start, end, offset))
                offset += size
            flat = zero.fp32_partitioned_groups_flat[index]
            group = int(zero.sub_group_to_group_id[index])
            shards.append(Shard(tuple(pieces), flat, zero.optimizer.state[flat], group, self.settings.optimizer))
        return shards

    def _local_state_bytes(self) -> int:
        masters = sum(shard.tensor.numel() * shard.tensor.element_size() for shard in self.shards())
        return masters + super()._local_state_bytes()

    def _held(self, name: str) -> torch.Tensor:
        """What this rank keeps of a parameter: its partition, or the whole."""
        parameter: Any = self.parameters[name]
        held: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
        return held

    def _local_tensor(self, name: str) -> torch.Tensor:
        return self._held(name).detach()

    def held(self, name: str) -> tuple[int, torch.Tensor]:
        """This rank's partition, without its padding, or the whole where it is not partitioned."""
        if name not in self.parameters:
            return super().held(name)
        parameter: Any = self.parameters[name]
        flat = self._held(name).detach().view(-1)
        if not hasattr(parameter, "ds_tensor"):
            return 0, flat
        start = self.rank * flat.numel()
        return start, flat[: max(0, int(parameter.ds_numel) - start)]

    def _numel(self, parameter: torch.nn.Parameter) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """A hash of this rank's bits; under ZeRO-3 it also tells when a copy that is read instead of the partition differs.

        A collective where parameters have second copies.
        """
        found = super().digests(names)
        if self.zero_stage == 3:
            for name in names:
                if not self._copy_agrees(self.parameters[name]):
                    found[name] += ", and the gathered copy differs"
                if self._second_differs(name):
                    found[name] += ", and the second copy differs"
        return found

    def second_copy(self, name: str) -> torch.Tensor | None:
        """This rank's share of the copy that its group of `zero_hpz_partition_size` ranks keeps; None where there is none now.

        It is made when the parameter is partitioned after use, and dropped by the next step if the parameter is live.
        """
        held: torch.Tensor | None = getattr(self.parameters[name], "ds_secondary_tensor", None)
        return held

    def _second_differs(self, name: str) -> bool:
        """Whether the group's copy is another than the partitions of all ranks make up. A collective."""
        second = self.second_copy(name)
        if second is None:  # on all ranks, or on none
            return False
        import deepspeed

        parameter: Any = self.parameters[name]
        # While it is whole already it would be compared with itself.
        if parameter.ds_status.name == "AVAILABLE" and not parameter.ds_persist:
            parameter.partition()
        first = second.numel() * (self.rank % int(parameter.ds_secondary_tensor_group_size))
        with deepspeed.zero.GatheredParameters([parameter]):
            mine = parameter.detach().view(-1)[first : first + second.numel()]
            return not torch.equal(mine, second[: mine.numel()].to(mine.device))

    def _copy_agrees(self, parameter: Any) -> bool:
        """Small parameters stay whole on every rank; the forward pass reads that copy and not the partition."""
        if parameter.ds_status.name != "AVAILABLE":
            return True
        held = parameter.ds_tensor.detach().view(-1)
        start = self.rank * held.numel()
        mine = parameter.detach().view(-1)[start : start + held.numel()]
        return torch.equal(mine, held[: mine.numel()].to(mine.device))

    def full_parameters(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Whole parameters, gathered one at a time under ZeRO-3."""
        import deepspeed

        for name in self.parameters if names is None else names:
            parameter = self.parameters[name]
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                yield name, parameter.detach().cpu().clone() if self.is_main else None

    def _scale_can_fall(self) -> bool:
        if not self.scales_loss:
            return False
        scaler = self._zero().loss_scaler
        return bool(scaler.dynamic) and scaler.cur_scale > scaler.min_scale

    def scaler_state(self) -> dict[str, Any] | None:
        """How far DeepSpeed's scaler is, under its own names; its settings are the config's."""
        if not self.scales_loss:
            return None
        scaler = self._zero().loss_scaler
        return {"loss_scale": float(scaler.cur_scale), "deepspeed": {k: v for k, v in vars(scaler).items() if k in _SCALER}}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """All of it from a DeepSpeed engine, else the scale alone."""
        scaler = self._zero().loss_scaler
        if scaler.dynamic:
            # What an older checkpoint holds beside these would put back the settings of the run that saved it.
            vars(scaler).update({k: v for k, v in state.get("deepspeed", {}).items() if k in _SCALER})
            scaler.cur_scale = max(state["loss_scale"], scaler.min_scale)
            scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)


# Number of ranks → the group that this rank is in, and the group of all ranks that it is a part of.
_SECOND_GROUPS: dict[int, tuple[Any, Any]] = {}


def second_group(deepspeed: Mapping[str, Any]) -> None:
    """Has DeepSpeed spread second copies over the ranks that a config says, or keep none. A collective.

    DeepSpeed has one such group in a process and never drops it: whatever is partitioned next would use it too, and a second
    model with the same option would not be partitioned at all.

    Args:
        deepspeed: the literal DeepSpeed JSON.
    """
    from deepspeed.utils import groups

    size, everyone = second_copies(deepspeed["zero_optimization"]), torch.distributed.group.WORLD
    if size > 1 and _SECOND_GROUPS.get(size, (None, None))[1] is not everyone:
        vars(groups)["_ZERO_PARAM_INTRA_PARALLEL_GROUP"] = None
        groups._create_zero_param_parallel_group(size)
        _SECOND_GROUPS[size] = groups._get_zero_param_intra_parallel_group(), everyone
    vars(groups)["_ZERO_PARAM_INTRA_PARALLEL_GROUP"] = _SECOND_GROUPS[size][0] if size > 1 else None


def leave_flat_buffer(held: torch.Tensor) -> None:
    """Gives a tensor that freezes memory of its own: as a view it would keep the old engine's whole flat buffer alive."""
    if held.untyped_storage().nbytes() > held.numel() * held.element_size():
        own = held.detach().clone()
        held.data = own.pin_memory() if held.is_pinned() else own


def forget_globals(module: torch.nn.Module) -> None:
    """Module-level state of DeepSpeed that grows with each ZeRO-3 engine and keeps coordinator and model alive."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    # Every ZeRO-3 engine leaves its root module at the bottom of this stack; gradient checkpointing, which breaks off a
    # recomputed forward pass when it has what it needs, leaves modules of each block on top.
    own = set(module.modules())
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry not in own]
    # An lru_cache on a method: its keys hold the coordinator and all modules.
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = vars(coordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for candidate in (cached, *(cell.cell_contents for cell in cached.__closure__ or ())):
        if hasattr(candidate, "cache_clear"):
            candidate.cache_clear()


def check_release(release: str, zero_stage: int, *, on_cpu: bool, checkpointing: bool) -> None:
    """Refuses DeepSpeed releases in which a combination was measured to be wrong (docs/deepspeed.md).

    Raises:
        UserError: naming the first good release.
    """
    needed, why = "0.19.0", "accumulates gradients wrongly under ZeRO-2 when the caller sets the boundary"
    if zero_stage == 3 and on_cpu:
        needed, why = "0.19.8", "does not wait for all gathered parameters under ZeRO-3 over gloo"
    elif zero_stage == 3 and checkpointing:
        needed, why = "0.19.3", "fails under ZeRO-3 with non-reentrant gradient checkpointing and frozen parameters"
    if Version(release) < Version(needed):
        raise UserError(
            f"engine.deepspeed: DeepSpeed {release} {why}; upgrade to {needed} or later (pip install 'deepspeed>={needed}')"
        )


def _offsets(zero: Any, group: int, parameters: Sequence[torch.Tensor]) -> list[int]:
    """Where each parameter begins in the group's flat buffer; newer releases may pad between them."""
    if hasattr(zero, "round_robin_bit16_offsets"):
        return [int(offset) for offset in zero.round_robin_bit16_offsets[group]]
    offsets, offset = [], 0
    for parameter in parameters:
        offsets.append(offset)
        offset += parameter.numel()
    return offsets


def stage_config(deepspeed: Mapping[str, Any], settings: EngineSettings, world_size: int, hidden: int) -> dict[str, Any]:
    """A stage's whole DeepSpeed config: the user's literal keys, ours, and "auto" values filled."""
    config = as_deepspeed_reads_it(deepspeed)
    config.update(
        train_micro_batch_size_per_gpu=settings.micro_batch_size,
        # Accumulation is ours: the boundary is set before each micro-batch and nothing is scaled by this number. Above 1
        # it makes offload keep its accumulation buffers.
        gradient_accumulation_steps=2,
        train_batch_size=settings.micro_batch_size * 2 * world_size,
        gradient_clipping=settings.max_grad_norm or 0.0,
        zero_allow_untested_optimizer=True,
        # torch's fused AdamW is vectorised on the CPU too, and bitsandbytes has kernels for it; DeepSpeed's own optimizers would
        # need a compiler on every node.
        zero_force_ds_cpu_optimizer=False,
        bf16={"enabled": settings.precision == "bf16_params"},
    )
    config.setdefault("steps_per_print", 2**31)
    if settings.precision == "fp16":
        config["fp16"] = {**config.get("fp16", {}), "enabled": True}
    else:
        config["fp16"] = {"enabled": False}
    if settings.precision == "bf16":
        # The empty list keeps gradients and their communication in fp32; an autocast around the engine is turned off on a GPU.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    zero = config["zero_optimization"]
    for key, value in {
        # Below some millions of elements the latency of the collectives decides, not their bandwidth.
        "reduce_bucket_size": max(hidden * hidden, 5_000_000),
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }.items():
        if zero.get(key) == "auto":
            zero[key] = value
    return config
