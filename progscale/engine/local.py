"""One process, and several with the whole model on each (DDP)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from progscale.engine.base import Engine, EngineSettings
from progscale.engine.state import Piece, Shard
from progscale.optim import StageBuild


class LocalEngine(Engine):
    """Every rank holds the whole model and the whole optimizer state; gradients are averaged by DDP."""

    def __init__(self, module: torch.nn.Module, settings: EngineSettings, accelerator: Any) -> None:
        super().__init__(module, settings, accelerator)
        self.name = "ddp" if self.world_size > 1 else "plain"
        self.module.to(self.device)
        self.optimizer: torch.optim.Optimizer | None = None
        self._model: Any = None
        # The scaler outlives the stages, and with it the loss scale.
        self._scaler = torch.amp.GradScaler(self.device.type) if settings.precision == "fp16" else None
        self.scales_loss = self._scaler is not None

    def _build(self, build: StageBuild) -> None:
        self.optimizer = self.settings.optimizer.build(self.parameters, build.groups)
        # DDP fixes its buckets when it is made, so each stage needs its own.
        self._model = self.accelerator.prepare(self.module)

    def _release(self) -> None:
        self.optimizer = None
        self._model = None
        self._forget_prepared()

    def _wrapped(self) -> Callable[..., Any]:
        return self._model

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last or self.world_size == 1 else self._model.no_sync()

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        (self._scaler.scale(loss) if self._scaler else loss).backward()

    def _gradients(self) -> list[torch.Tensor]:
        assert self.optimizer is not None
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _gradient_norm_squared(self) -> torch.Tensor:
        if self._scaler and self.optimizer:
            self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return norm * norm

    def _discard(self) -> None:
        assert self.optimizer is not None
        if self._scaler:
            self._scaler.update(self._scaler.get_scale())  # forgets what it saw, and leaves the scale alone
        self.optimizer.zero_grad(set_to_none=True)

    def _apply(self, learning_rate: float, grad_norm: float) -> bool:
        assert self.optimizer is not None
        # Torch multiplies by max / (norm + 1e-6), at most 1: below that it is a pass over all gradients for nothing.
        if self.settings.max_grad_norm is not None and grad_norm + 1e-6 > self.settings.max_grad_norm:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = torch.tensor(grad_norm, dtype=torch.float32, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._scaler:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return math.isfinite(grad_norm)

    def _scale_can_fall(self) -> bool:
        return self._scaler is not None and self._scaler.get_scale() > 1.0

    def scaler_state(self) -> dict[str, Any] | None:
        """Torch's own state of the scaler."""
        if self._scaler is None:
            return None
        return {"loss_scale": self._scaler.get_scale(), "torch": self._scaler.state_dict()}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """All of it from torch's scaler, else the scale alone."""
        assert self._scaler is not None
        self._scaler.load_state_dict(state.get("torch") or {**self._scaler.state_dict(), "scale": state["loss_scale"]})

    def shards(self) -> list[Shard]:
        """One shard for each parameter; the optimizer steps the parameters themselves."""
        assert self.optimizer is not None and self.build is not None
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        shards = []
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                piece = Piece(names[id(parameter)], 0, parameter.numel(), 0)
                state = self.optimizer.state[parameter]
                shards.append(Shard((piece,), parameter, state, index, self.settings.optimizer))
        return shards

    def full_parameters(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Whole parameters on the CPU of the main process."""
        for name in self.parameters if names is None else names:
            yield name, self.parameters[name].detach().cpu() if self.is_main else None
