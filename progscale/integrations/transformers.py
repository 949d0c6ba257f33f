"""Progressive stages for an existing `transformers.Trainer` script, in one line.

    trainer = Trainer(model, args, train_dataset=…)
    make_progressive(trainer)
    trainer.train()

A callback alone cannot do it: the Trainer hands a local `model` to its training step, and has loaded a checkpoint before any
callback is asked. So methods of the instance are wrapped: `create_optimizer` builds the param groups of the stage that the run
begins in (or was saved in), `_prepare_for_training` gives the loop a model that follows the stages, `training_step` hands on the
stage's own, `_finalize_training` ends the last stage. A callback switches before the first micro-batch of a stage. The Trainer
keeps its own steps, curve, logging, evaluation and checkpoints.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from progscale.engine.adopted import check_deepspeed
from progscale.engine.base import EngineSettings
from progscale.errors import UserError
from progscale.integrations.stages import Following, StageOutcome, Stages, default_stages, rebind_scheduler
from progscale.optimizers.adamw import AdamW
from progscale.optimizers.base import Request
from progscale.schedule import SCHEDULES, EmbeddingsPolicy

FILE = "progressive.json"
# Optimizers of TrainingArguments.optim whose state is carried over a stage switch, and whether they are fused.
OPTIMIZERS = {"adamw_torch": False, "adamw_torch_fused": True}
FIRST_RELEASE = "5.3"
# Of data without a length the Trainer takes the epochs to be endless.
MOST_EPOCHS = 1_000_000


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
    for name in ("create_optimizer", "_prepare_for_training", "training_step", "_finalize_training", "train"):
        setattr(trainer, name, functools.partial(getattr(progressive, name.lstrip("_")), getattr(trainer, name)))
    # Before all others, which then see the optimizer of the stage.
    trainer.callback_handler.callbacks.insert(0, _Callback(progressive))
    trainer.progressive = progressive
    return progressive


def trainer_faults(trainer: Any) -> list[str]:
    """What keeps a Trainer from being trained in stages exactly."""
    args = trainer.args
    checkpointing = bool(args.gradient_checkpointing)
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    own = [
        name
        for name in ("create_optimizer", "get_optimizer_cls_and_kwargs", "create_scheduler", "create_optimizer_and_scheduler")
        if getattr(type(trainer), name) is not getattr(Trainer, name) or name in vars(trainer)
    ]
    if hasattr(trainer, "progressive"):
        return ["it is progressive already"]
    found = {
        f"transformers {FIRST_RELEASE} or newer is needed": not hasattr(trainer, "_prepare_for_training"),
        "optimizers=: give args.optim instead of an optimizer of your own, which every stage builds anew": trainer.optimizer
        is not None
        or trainer.optimizer_cls_and_kwargs is not None,
        "lr_scheduler: give args.lr_scheduler_type instead of a scheduler of your own": trainer.lr_scheduler is not None,
        f"{', '.join(own)}: of a subclass, whose optimizer or curve no stage would build anew; take those of args": bool(own),
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
        self._saved: dict[str, Any] | None = None
        self.stages: Stages | None = None

    @property
    def outcomes(self) -> list[StageOutcome]:
        """What the stages that are over did."""
        return [] if self.stages is None else self.stages.outcomes

    # -- in the Trainer's place -----------------------------------------------------------------------------------

    def train(self, train: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; however it ends, the model can be trained as before."""
        try:
            return train(*args, **kwargs)
        finally:
            if self.stages is not None:
                self.stages.restore()

    def create_optimizer(self, create: Any, model: Any = None) -> Any:
        """The optimizer of the stage that the run begins in, or that its checkpoint was saved in."""
        trainer = self._trainer
        args, state = trainer.args, trainer.state
        if self.stages is not None and self.stages.engine is None:
            return trainer.optimizer  # DeepSpeed's preparation has asked for it already
        if self.stages is not None:
            raise UserError("make_progressive: this Trainer has trained already; make a new one, and make that one progressive")
        if self._count is None and state.num_train_epochs > MOST_EPOCHS:
            raise UserError("make_progressive: stages=: give their number, as this data has no length that tells the epochs")
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
        self._check_saved()
        optimizer = self.stages.first_optimizer(self.stages.resumed_at(state.global_step))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
        trainer.optimizer = optimizer
        return optimizer

    def prepare_for_training(self, prepare: Any, max_steps: int, dataloader: Any, resume_from_checkpoint: Any = None) -> Any:
        """The Trainer's own preparation, with a model that follows the stages in the place of the first one."""
        trainer = self._trainer
        self._saved = read_saved(resume_from_checkpoint)
        _, dataloader = prepare(max_steps, dataloader, resume_from_checkpoint)
        assert self.stages is not None
        done = trainer.state.global_step
        self.stages.adopt(self.stages.resumed_at(done), trainer.model_wrapped, trainer.optimizer, trainer.accelerator, done)
        if self._saved is not None:
            self.stages.go_on_from(self._saved["outcomes"])
        self._model.current = trainer.model_wrapped
        return self._model, dataloader

    def training_step(self, step: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own step on the model of the stage."""
        return step(self._model.current, *args, **kwargs)

    def finalize_training(self, finalize: Any, *args: Any, **kwargs: Any) -> Any:
        """Ends the last stage first: a best model that is loaded in the end is of another one, and trackers are still there."""
        self.finish()
        return finalize(*args, **kwargs)

    # -- stages ---------------------------------------------------------------------------------------------------

    def switch_if_due(self) -> None:
        """Before the first micro-batch of each step. A collective where a stage begins.

        Raises:
            AuditError: a frozen tensor has changed.
        """
        trainer, stages = self._trainer, self.stages
        assert stages is not None and stages.engine is not None
        build = stages.due(trainer.state.global_step)
        if build is None:
            return
        stages.end_stage(trainer.state.global_step, self._log)
        groups = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in trainer.optimizer.param_groups]
        self._let_go()
        stages.begin(build, trainer.state.global_step)
        trainer.model_wrapped, trainer.optimizer = stages.engine.prepared_model, stages.engine.prepared
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed = trainer.model_wrapped
        rebind_scheduler(trainer.lr_scheduler, trainer.optimizer, groups)
        self._model.current = trainer.model_wrapped
        trainer.callback_handler.optimizer = trainer.optimizer

    def _let_go(self) -> None:
        """Nobody keeps the old stage's engine, and its memory, but the one that carries its state over."""
        trainer = self._trainer
        trainer.model_wrapped, trainer.optimizer = trainer.model, None
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed = None
        trainer.callback_handler.optimizer = None
        trainer.lr_scheduler.optimizer = None
        self._model.current = None

    def finish(self) -> None:
        """Ends the last stage, and writes what all of them did. A collective."""
        trainer, stages = self._trainer, self.stages
        assert stages is not None
        stages.end_stage(trainer.state.global_step, self._log)
        self._write(Path(trainer.args.output_dir), stages.outcomes)

    def saved(self) -> None:
        """Puts what the stages have done so far beside the Trainer's own checkpoint. A collective."""
        trainer, stages = self._trainer, self.stages
        assert stages is not None
        folder = Path(trainer._get_output_dir(trial=None)) / f"checkpoint-{trainer.state.global_step}"
        self._write(folder, [*stages.outcomes, stages.so_far(trainer.state.global_step)])

    def _write(self, folder: Path, outcomes: Sequence[StageOutcome]) -> None:
        if self._trainer.is_world_process_zero():
            content = {"schedule": self._schedule, "plan": self._plan(), "outcomes": [outcome.to_json() for outcome in outcomes]}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _plan(self) -> list[list[Any]]:
        """What a checkpoint must have in common with the run that goes on from it: steps and live blocks of each stage."""
        assert self.stages is not None
        stages = [build.stage for build in self.stages.builds]
        return [
            [stage.start_step, stage.end_step, stage.embeddings, {stack: list(live) for stack, live in stage.live_blocks.items()}]
            for stage in stages
        ]

    def _check_saved(self) -> None:
        """Refuses a checkpoint of other stages: its optimizer has other param groups."""
        if self._saved is not None and self._saved["plan"] != self._plan():
            (old, old_end), (new, new_end) = (
                ([stage[0] for stage in plan], plan[-1][1]) for plan in (self._saved["plan"], self._plan())
            )
            raise UserError(
                "make_progressive: the checkpoint was saved in a run of other stages (schedule, stages, embeddings or steps "
                f"differ): they begin at {old} and end with step {old_end}, these at {new} and with {new_end}"
            )

    def _log(self, outcome: StageOutcome) -> None:
        self._trainer.log(
            {f"progressive/{key}": value for key, value in outcome.to_json().items() if isinstance(value, int | float)}
        )


def read_saved(checkpoint: Any) -> dict[str, Any] | None:
    """What lies beside a Trainer's checkpoint; None where nothing does.

    Raises:
        UserError: it is damaged.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"plan": content["plan"], "outcomes": content["outcomes"]}
    except FileNotFoundError:
        raise UserError(
            f"make_progressive: '{checkpoint}' has no {FILE}: a Trainer without stages has saved it, whose optimizer has other "
            "groups"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"make_progressive: '{path}' cannot be read: {error}") from error


class _Callback(TrainerCallback):  # type: ignore[misc]
    """Tells the stages where the Trainer is; on every rank."""

    def __init__(self, progressive: Progressive) -> None:
        self._progressive = progressive

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch of a step, and before it is decided what of it is synchronised."""
        self._progressive.switch_if_due()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is written."""
        self._progressive.saved()


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
