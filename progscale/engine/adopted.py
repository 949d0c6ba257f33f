"""Engines over what somebody else's loop has prepared with its own Accelerator: they switch stages, and leave the steps to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from progscale.engine.base import EngineSettings
from progscale.engine.deepspeed import DeepSpeedEngine
from progscale.engine.local import LocalEngine
from progscale.errors import UserError
from progscale.optim import StageBuild


class Adopted(Protocol):
    """What a loop of somebody else's needs of an engine, beside `Engine`."""

    @property
    def prepared_model(self) -> Any:
        """The model as Accelerate wraps it in this stage."""
        ...

    prepared: Any
    """The optimizer as Accelerate gives it out."""

    def adopt(self, build: StageBuild, model: Any, optimizer: Any) -> None:
        """Takes over a stage that the loop has prepared itself."""
        ...


class AdoptedLocalEngine(LocalEngine):
    """One process or DDP. The loss scale of fp16 is the Accelerator's, which outlives the stages.

    Args:
        module: the model itself.
        settings: the optimizer's alone count.
        accelerator: the loop's own.
    """

    def __init__(self, module: torch.nn.Module, settings: EngineSettings, accelerator: Any) -> None:
        super().__init__(module, settings, accelerator)
        self.prepared: Any = None
        self._kept: Any = None

    @property
    def prepared_model(self) -> Any:
        """The model itself, or in DDP."""
        return self._model

    def adopt(self, build: StageBuild, model: Any, optimizer: Any) -> None:
        """Takes over a stage that the loop has prepared itself."""
        self.build, self._model, self.prepared = build, model, optimizer
        self.optimizer = optimizer.optimizer

    def _build(self, build: StageBuild) -> None:
        self.optimizer = self.settings.optimizer.build(self.parameters, build.groups)
        if self.world_size > 1:
            # DDP fixes its buckets when it is made.
            self._model, self.prepared = self.accelerator.prepare(self.module, self.optimizer)
        else:
            # Prepared once more, the model's forward would be wrapped in autocast once more.
            self._model, self.prepared = self._kept, self.accelerator.prepare(self.optimizer)
            self.accelerator._models.append(self._model)

    def _release(self) -> None:
        # DDP's is made anew.
        self._kept = self._model if self.world_size == 1 else None
        if self.world_size > 1:
            take_off_autocast(self.module)
        self.prepared = None
        super()._release()

    def _forget_prepared(self) -> None:
        with keeping(self.accelerator):
            super()._forget_prepared()


class AdoptedDeepSpeedEngine(DeepSpeedEngine):
    """ZeRO 1, 2 and 3, with the DeepSpeed config that the loop's Accelerator has.

    Args:
        module: the model itself.
        settings: optimizer and precision count.
        accelerator: the loop's own, which has prepared the first stage: its config has no "auto" left.
    """

    def __init__(self, module: torch.nn.Module, settings: EngineSettings, accelerator: Any) -> None:
        super().__init__(module, settings, accelerator, accelerator.state.deepspeed_plugin.hf_ds_config.config)

    @property
    def prepared_model(self) -> Any:
        """DeepSpeed's engine."""
        return self._engine

    def adopt(self, build: StageBuild, model: Any, optimizer: Any) -> None:
        """Takes over a stage that the loop has prepared itself."""
        self.build, self._engine, self.prepared = build, model, optimizer
        save_whole(self._engine)

    def _build(self, build: StageBuild) -> None:
        super()._build(build)
        save_whole(self._engine)

    def _forget_prepared(self) -> None:
        with keeping(self.accelerator):
            super()._forget_prepared()

    def _write_config(self) -> None:
        """It is the loop's, and the same in all stages."""


@contextlib.contextmanager
def keeping(accelerator: Any) -> Iterator[None]:
    """Model and optimizer are made anew; data, schedulers and the count of micro-batches are the loop's, and stay."""
    schedulers, loaders, step = list(accelerator._schedulers), list(accelerator._dataloaders), accelerator.step
    yield
    accelerator._schedulers[:], accelerator._dataloaders[:], accelerator.step = schedulers, loaders, step


def take_off_autocast(module: torch.nn.Module) -> None:
    """Gives a module its own forward back, which the next stage's preparation wraps in autocast again.

    Accelerate's own way takes off whatever decorates the forward, that of transformers' models too.
    """
    original = module.__dict__.pop("_original_forward", None)
    if original is None:
        return
    is_the_class_own = getattr(original, "__self__", None) is module and "forward" in module.__dict__
    if is_the_class_own and getattr(original, "__func__", None) is type(module).forward:
        del module.forward
    else:
        module.forward = original


def save_whole(engine: Any) -> None:
    """Has a DeepSpeed engine save what is frozen in its stage too, whoever asks it to leave that out.

    transformers leaves frozen parameters of PEFT models out of checkpoints and exports, where this method has an argument for it.
    What an earlier stage has trained is frozen in a later one, and would be lost.
    """
    save = engine.save_checkpoint

    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: Any = None, save_latest: bool = True) -> Any:
        return save(save_dir, tag, client_state or {}, save_latest)

    engine.save_checkpoint = save_checkpoint


def adopt(module: torch.nn.Module, settings: EngineSettings, accelerator: Any) -> AdoptedLocalEngine | AdoptedDeepSpeedEngine:
    """The engine for a loop's Accelerator, which has prepared the first stage.

    Raises:
        UserError: it prepares models in a way that no stage switch supports here.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "DEEPSPEED":
        return AdoptedDeepSpeedEngine(module, settings, accelerator)
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return AdoptedLocalEngine(module, settings, accelerator)
    raise UserError(f"progressive training: {kind} has no stage switch here; take one process, DDP, or DeepSpeed ZeRO 1, 2 or 3")


def check_deepspeed(accelerator: Any) -> None:
    """Refuses DeepSpeed configs that would switch stages wrongly; has offload keep the optimizer that the loop chose.

    Raises:
        UserError: naming the key.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"DeepSpeed config: '{key}' would begin anew with each stage; remove it, the loop's own is used")
    zero = config.get("zero_optimization") or {}
    if int(zero.get("stage", 0)) == 0:
        raise UserError(
            "DeepSpeed config: zero_optimization.stage 0 has no stage switch here; take 1, 2 or 3, or DDP without DeepSpeed"
        )
    if (zero.get("offload_param") or {}).get("device") == "nvme" or (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise UserError('DeepSpeed config: offload to nvme is for progscale\'s own loop; take "cpu"')
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        if config.get("zero_force_ds_cpu_optimizer"):
            raise UserError(
                "DeepSpeed config: zero_force_ds_cpu_optimizer puts another optimizer in the place of yours; set it to false"
            )
        if float(zero["offload_optimizer"].get("ratio", 1)) < 1:
            raise UserError("DeepSpeed config: offload_optimizer.ratio below 1 has no stage switch here; remove it")
        config["zero_force_ds_cpu_optimizer"] = False
    if int(zero["stage"]) == 1 and str((config.get("data_types") or {}).get("grad_accum_dtype")) in ("fp32", "float32"):
        raise UserError(
            "DeepSpeed config: data_types.grad_accum_dtype fp32 at ZeRO-1 is another optimizer, which has no stage switch; take "
            "ZeRO-2"
        )
    config["zero_allow_untested_optimizer"] = True
