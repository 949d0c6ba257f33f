"""Progressive stages for somebody's own loop over Accelerate, on one device, under DDP, or DeepSpeed ZeRO 1, 2 or 3.

accelerator = Accelerator()
loader = accelerator.prepare(loader)
stages = Progressive(accelerator, model, total_steps=3 * len(loader), stages=3, lr=2e-5)
for step, batch in enumerate(batches_of(loader)):
    model, optimizer = stages.at(step, lr=rate(step))
    accelerator.backward(model(**batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
stages.finish()
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from progscale.engine.adopted import check_deepspeed
from progscale.engine.base import EngineSettings
from progscale.errors import UserError
from progscale.integrations.stages import Following, StageOutcome, Stages
from progscale.optimizers import OPTIMIZERS, Request
from progscale.schedule import EmbeddingsPolicy

log = logging.getLogger("progscale")


class Progressive:
    """Model and optimizer by step; the loop stays the caller's.

    What requires a gradient when it is made is what is trained at most. Every rank makes one, and asks for every step.

    Args:
        accelerator: the loop's; model and optimizer are prepared here, so prepare the data alone before.
        model: not prepared.
        total_steps: optimizer steps of the whole run.
        stages: T.
        lr: learning rate where `at` is given none.
        schedule: a registered schedule.
        embeddings: when the embeddings are trained: always, first_stage, never.
        family: registered model family; None finds it by the model's type.
        schedule_options: of the schedule (`first_blocks`, `block_weights`, `starts`).
        optimizer: adamw, adamw_8bit, lion, … as `optimizer.name` of a config.
        weight_decay: of tensors of two or more dimensions.
        betas: of the optimizer's moments.
        eps: of AdamW.
        micro_batch_size: rows of a batch on a rank; DeepSpeed wants to know.
        steps_done: where a resumed loop goes on; call `accelerator.load_state` after this is made.

    Attributes:
        model: stands for the model as prepared for the stage at work, whichever that is; the same object in all of them.
        optimizer: the same for the optimizer.

    Raises:
        UserError: the Accelerator prepares models in a way that no stage switch supports here.
        ModelError: the model has no family, or cannot be cut into parts.
        ScheduleError: the stages do not fit.
    """

    def __init__(
        self,
        accelerator: Any,
        model: torch.nn.Module,
        *,
        total_steps: int,
        stages: int,
        lr: float,
        schedule: str = "progtuning",
        embeddings: EmbeddingsPolicy = "always",
        family: str | None = None,
        schedule_options: Mapping[str, Any] | None = None,
        optimizer: str = "adamw",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        micro_batch_size: int = 1,
        steps_done: int = 0,
    ) -> None:
        if not 0 <= steps_done < total_steps:
            raise UserError(f"steps_done: {steps_done} is no step of a run of {total_steps}, from 0")
        check_deepspeed(accelerator)
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.hf_ds_config.config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            plugin.hf_ds_config.config["train_micro_batch_size_per_gpu"] = micro_batch_size
        precision: Any = {"bf16": "bf16_params", "fp16": "fp16"}.get(accelerator.mixed_precision, "fp32")
        self._lr = lr
        self._stages = Stages(
            model,
            total_steps=total_steps,
            stages=stages,
            schedule=schedule,
            embeddings=embeddings,
            family=family,
            options=schedule_options,
            settings=EngineSettings(
                # Without DeepSpeed autocast and loss scale are the Accelerator's.
                precision="fp32" if plugin is None else precision,
                optimizer=OPTIMIZERS.get(optimizer).of(Request(betas, eps)),
            ),
            weight_decay=weight_decay,
        )
        build = self._stages.resumed_at(steps_done)
        first = self._stages.first_optimizer(build)
        for group in first.param_groups:
            group["lr"] = lr
        made_model, made_optimizer = accelerator.prepare(model, first)
        self._accelerator = accelerator
        self.model, self.optimizer = Following(made_model), Following(made_optimizer)
        self._pending: tuple[Any, Any, int] | None = (build, accelerator, steps_done)

    @property
    def outcomes(self) -> list[StageOutcome]:
        """What the stages that are over did."""
        return self._stages.outcomes

    def at(self, step: int, lr: float | None = None) -> tuple[Any, Any]:
        """Model and optimizer for optimizer step `step` (0-based), switched where a stage begins there. A collective.

        With gradient accumulation it comes before `accelerator.accumulate`, and takes the same step for all micro-batches.

        Args:
            step: of the whole run; the same for all micro-batches of a step.
            lr: learning rate of the step.

        Raises:
            AuditError: a frozen tensor has changed.
            UserError: Accelerate has prepared a scheduler.
        """
        self._adopt()
        if self._accelerator._schedulers:
            raise UserError(
                "Progressive: a scheduler that Accelerate has prepared would set the rate of an optimizer that is gone; give "
                "at(step, lr=…) instead"
            )
        build = self._stages.due(step)
        if build is not None:
            self._stages.end_stage(step, self._log)
            self.model.current = self.optimizer.current = None
            self._stages.begin(build, step)
            engine = self._stages.engine
            assert engine is not None
            self.model.current, self.optimizer.current = engine.prepared_model, engine.prepared
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr if lr is None else lr
        return self.model, self.optimizer

    def finish(self) -> list[StageOutcome]:
        """Ends the last stage; returns what all of them did. A collective.

        Raises:
            AuditError: a frozen tensor has changed.
        """
        self._adopt()
        self._stages.end_stage(self._stages.total_steps, self._log)
        self._stages.restore()
        return self.outcomes

    def _adopt(self) -> None:
        """Once, when a resumed loop has loaded its state."""
        if self._pending is not None:
            build, accelerator, steps_done = self._pending
            self._pending = None
            self._stages.adopt(build, self.model.current, self.optimizer.current, accelerator, steps_done)

    def _log(self, outcome: StageOutcome) -> None:
        log.info(
            "stage %d: %d parameters trained in steps %d to %d, frozen tensors changed: %d",
            *(outcome.stage, outcome.trainable_parameters, outcome.start_step, outcome.end_step - 1, outcome.frozen_changed),
        )
