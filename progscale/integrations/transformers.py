"""Progressive stages for an existing `transformers.Trainer` script, in one line.

    trainer = Trainer(model, args, train_dataset=…)
    make_progressive(trainer)
    trainer.train()

A callback alone cannot do it: the Trainer hands a local `model` to its training step, and has loaded a checkpoint before any
callback is asked. So three methods of the instance are wrapped: `create_optimizer` builds the param groups of the stage that the
run begins in (or was saved in), `_prepare_for_training` gives the loop a model that follows the stages, and `training_step`
switches before the first micro-batch of a stage. The Trainer keeps its own steps, curve, logging, evaluation and checkpoints.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from progscale.engine.adopted import check_deepspeed
from progscale.engine.base import EngineSettings
from progscale.errors import UserError
from progscale.integrations.stages import StageOutcome, Stages, default_stages, rebind_scheduler
from progscale.optimizers.adamw import AdamW
from progscale.optimizers.base import Request
from progscale.schedule import SCHEDULES, EmbeddingsPolicy

FILE = "progressive.json"
# Optimizers of TrainingArguments.optim whose state is carried over a stage switch, and whether they are fused.
OPTIMIZERS = {"adamw_torch": False, "adamw_torch_fused": True}
FIRST_RELEASE = "5.3"


def make_progressive(
    trainer: Any,
    *,
    schedule: str = "progtuning",
    stages: int | None = None,
    embeddings: EmbeddingsPolicy = "always",
    family: str | None = None,
    schedule_options: Mapping[str, Any] | None = None,
) -> Progressive:
    """Has a Trainer train in stages. To be called once, after the Trainer is made and before `train`.

    What requires a gradient now is what is trained at most, so a PEFT model is fine. Frozen tensors are hashed before and after
    each stage. `OUTPUT_DIR/progressive.json` tells what each stage trained, and the Trainer's log has a line for it.

    Args:
        trainer: a `transformers.Trainer`, or a subclass that leaves the inner loop as it is; on one device, under DDP
            (`torchrun`, `accelerate launch`), or DeepSpeed ZeRO 1, 2 or 3.
        schedule: a registered schedule.
        stages: T; by default one for each epoch.
        embeddings: when they are trained: always, first_stage, never.
        family: registered model family; None finds it by the model's type.
        schedule_options: of the schedule (`first_blocks`, `block_weights`, `starts`).

    Returns:
        The stages; `outcomes` has what each did.

    Raises:
        UserError: the Trainer's settings cannot be trained in stages exactly; the message names them all.
        RegistryError: unknown schedule.
    """
    SCHEDULES.get(schedule)
    faults = trainer_faults(trainer)
    if faults:
        raise UserError("make_progressive: " + "; ".join(faults))
    check_deepspeed(trainer.accelerator)
    progressive = Progressive(trainer, schedule, stages, embeddings, family, dict(schedule_options or {}))
    trainer.create_optimizer = progressive.create_optimizer
    trainer._prepare_for_training = functools.partial(progressive.prepare_for_training, trainer._prepare_for_training)
    trainer.training_step = functools.partial(progressive.training_step, trainer.training_step)
    trainer.add_callback(_Finish(progressive))
    trainer.progressive = progressive
    return progressive


def trainer_faults(trainer: Any) -> list[str]:
    """What keeps a Trainer from being trained in stages exactly."""
    args = trainer.args
    checkpointing = bool(args.gradient_checkpointing)
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    found = {
        "it is progressive already": hasattr(trainer, "progressive"),
        f"transformers {FIRST_RELEASE} or newer is needed": not hasattr(trainer, "_prepare_for_training"),
        "optimizers=: give args.optim instead of an optimizer of your own, which every stage builds anew": trainer.optimizer
        is not None
        or trainer.optimizer_cls_and_kwargs is not None,
        "lr_scheduler: give args.lr_scheduler_type instead of a scheduler of your own": trainer.lr_scheduler is not None,
        f"args.optim: '{_value(args.optim)}' has no stage switch here; take {' or '.join(OPTIMIZERS)}": _value(args.optim)
        not in OPTIMIZERS,
        "args.optim_target_modules: layer-wise optimizers have no stage switch": bool(args.optim_target_modules),
        "args.fsdp: FSDP has no stage switch here; take DDP or DeepSpeed ZeRO": bool(trainer.is_fsdp_enabled),
        "several GPUs in one process (DataParallel): start a process for each GPU with torchrun": args.n_gpu > 1,
        "args.torch_compile: a compiled model has no stage switch here": bool(args.torch_compile),
        "args.auto_find_batch_size: it begins the loop anew with other steps; give a batch size": bool(args.auto_find_batch_size),
        "model_init: stages are made for one model; give model=": trainer.model_init is not None,
        "args.gradient_checkpointing: set gradient_checkpointing_kwargs={'use_reentrant': False}; the reentrant kind loses the "
        "gradients behind frozen blocks": checkpointing and reentrant is not False,
        "args.load_best_model_at_end: under DeepSpeed the best checkpoint may be of another stage's engine; load it after "
        "training": bool(args.load_best_model_at_end) and trainer.is_deepspeed_enabled,
    }
    return [text for text, is_so in found.items() if is_so]


def _value(name: Any) -> str:
    return str(getattr(name, "value", name))


class Progressive:
    """The stages of one Trainer; `make_progressive` makes it.

    Attributes:
        stages: what is built when; None before `train`.
    """

    def __init__(
        self,
        trainer: Any,
        schedule: str,
        stages: int | None,
        embeddings: EmbeddingsPolicy,
        family: str | None,
        options: dict[str, Any],
    ) -> None:
        self._trainer = trainer
        self._schedule, self._count, self._embeddings, self._family, self._options = schedule, stages, embeddings, family, options
        self._model = Following()
        self.stages: Stages | None = None

    @property
    def outcomes(self) -> list[StageOutcome]:
        """What the stages that are over did."""
        return [] if self.stages is None else self.stages.outcomes

    # -- in the Trainer's place -----------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the stage that the run begins in, or that its checkpoint was saved in."""
        trainer = self._trainer
        args, state = trainer.args, trainer.state
        if self.stages is not None and self.stages.engine is None:
            return trainer.optimizer  # DeepSpeed's preparation has asked for it already
        if self.stages is not None:
            raise UserError("make_progressive: this Trainer has trained already; make a new one, and make that one progressive")
        self.stages = Stages(
            trainer.model,
            total_steps=state.max_steps,
            stages=self._count or default_stages(state.num_train_epochs),
            schedule=self._schedule,
            embeddings=self._embeddings,
            family=self._family,
            options=self._options,
            settings=EngineSettings(precision=precision_of(trainer), optimizer=optimizer_of(args)),
            weight_decay=args.weight_decay,
            decayed=frozenset(trainer.get_decay_parameter_names(trainer.model)),
        )
        optimizer = self.stages.first_optimizer(self.stages.resumed_at(state.global_step))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
        trainer.optimizer = optimizer
        return optimizer

    def prepare_for_training(self, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own preparation, with a model that follows the stages in the place of the first one."""
        trainer = self._trainer
        _, dataloader = prepare(*args, **kwargs)
        assert self.stages is not None
        done = trainer.state.global_step
        self.stages.adopt(self.stages.resumed_at(done), trainer.model_wrapped, trainer.optimizer, trainer.accelerator, done)
        self._model.follow(trainer.model_wrapped)
        return self._model, dataloader

    def training_step(self, step: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Switches where a stage begins, then the Trainer's own step on the model of the stage."""
        assert self.stages is not None
        # The count goes up with the optimizer's step: the first micro-batch of a stage's first step sees the new stage.
        build = self.stages.due(self._trainer.state.global_step)
        if build is not None:
            self._switch(build)
        return step(self._model.current, *args, **kwargs)

    # -- stages ---------------------------------------------------------------------------------------------------

    def _switch(self, build: Any) -> None:
        trainer, stages = self._trainer, self.stages
        assert stages is not None and stages.engine is not None
        groups = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in trainer.optimizer.param_groups]
        self._let_go()
        stages.switch(build, trainer.state.global_step, self._log)
        trainer.model_wrapped, trainer.optimizer = stages.engine.prepared_model, stages.engine.prepared
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed = trainer.model_wrapped
        rebind_scheduler(trainer.lr_scheduler, trainer.optimizer, groups)
        self._model.follow(trainer.model_wrapped)
        trainer.callback_handler.optimizer = trainer.optimizer

    def _let_go(self) -> None:
        """Nobody keeps the old stage's engine, and its memory, but the one that carries its state over."""
        trainer = self._trainer
        trainer.model_wrapped, trainer.optimizer = trainer.model, None
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed = None
        trainer.callback_handler.optimizer = None
        trainer.lr_scheduler.optimizer = None
        self._model.follow(None)

    def finish(self) -> None:
        """Ends the last stage, and writes what all of them did. A collective."""
        trainer, stages = self._trainer, self.stages
        assert stages is not None
        stages.end_stage(trainer.state.global_step, self._log)
        if trainer.is_world_process_zero():
            content = {"schedule": self._schedule, "stages": [outcome.to_json() for outcome in stages.outcomes]}
            folder = Path(trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _log(self, outcome: StageOutcome) -> None:
        self._trainer.log(
            {f"progressive/{key}": value for key, value in outcome.to_json().items() if isinstance(value, int | float)}
        )


class Following:
    """Stands for the model in the Trainer's loop: whatever is asked of it is asked of the stage's own."""

    def __init__(self) -> None:
        self.current: Any = None

    def follow(self, model: Any) -> None:
        """From now on it stands for this one."""
        self.current = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        return self.current(*args, **kwargs)


class _Finish(TrainerCallback):  # type: ignore[misc]
    """Ends the last stage when training ends."""

    def __init__(self, progressive: Progressive) -> None:
        self._progressive = progressive

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer on every rank."""
        self._progressive.finish()


def precision_of(trainer: Any) -> Any:
    """As engines name it."""
    args = trainer.args
    if not trainer.is_deepspeed_enabled:
        # Autocast and loss scale are the Accelerator's.
        return "fp32"
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    if (config.get("fp16") or {}).get("enabled") is True or (args.fp16 and (config.get("fp16") or {}).get("enabled") == "auto"):
        return "fp16"
    return "bf16_params" if (config.get("bf16") or {}).get("enabled") is True or args.bf16 else "fp32"


def optimizer_of(args: Any) -> AdamW:
    """The optimizer of TrainingArguments."""
    request = Request((args.adam_beta1, args.adam_beta2), args.adam_epsilon, OPTIMIZERS[_value(args.optim)])
    return AdamW.of(request)
