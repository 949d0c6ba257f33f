"""A plug-in that makes one rank's step not finite, and looks whether the step changed anything.

    PROGSCALE_POISON="gradient:inf@5-6,rank=1"    KIND:VALUE@FIRST-LAST,rank=R: optimizer steps from FIRST to LAST
    PROGSCALE_POISON_OUT=FOLDER                   gets a file for each rank: what it saw of each of the steps, as JSON lines

Kinds: the loss, its gradient (the loss itself stays finite), the input of the first block, a weight (once, in the first step).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.harness import inject, patches

PATTERN = re.compile(r"(loss|gradient|input|weight):(nan|inf)@(\d+)-(\d+),rank=(\d+)")


@dataclass
class Poison:
    """What is poisoned, where and when."""

    kind: str
    value: float
    first: int
    last: int
    rank: int

    @staticmethod
    def parse(text: str) -> Poison:
        """From PROGSCALE_POISON."""
        found = PATTERN.fullmatch(text)
        assert found is not None, text
        return Poison(found[1], float(found[2]), int(found[3]), int(found[4]), int(found[5]))

    def loss(self, function: Any) -> Any:
        """The loss function, poisoned once."""
        left = [True]

        def loss(outputs: Any, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
            value: torch.Tensor = function(outputs, labels)
            if not left:
                return value
            left.clear()
            if self.kind == "loss":
                return value * self.value
            value.register_hook(lambda gradient: gradient * self.value)
            return value

        return loss

    def weight(self, engine: Any) -> None:
        """One element that this rank holds of a dense layer in a block."""
        names = [name for name in engine.build.live if ".layer." in name and name.endswith("dense.weight")]
        held = {name: engine._local_tensor(name).view(-1) for name in names}
        name = max(sorted(held), key=lambda name: held[name].numel())
        with torch.no_grad():
            held[name][0] = self.value


def bits(engine: Any) -> str:
    """A hash of all that this rank holds: the model's tensors, the optimizer's masters and moments, and its step counts."""
    digest = hashlib.sha256(json.dumps(engine.digests(list(engine.parameters))).encode())
    for part in engine.own_slices():
        digest.update(json.dumps([part.name, part.start, part.end, sorted(part.scalars.items())]).encode())
        for _, tensor in sorted(part.tensors.items()):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def poisoned(original: Any) -> Any:
    """Engine.train_step."""
    poison = Poison.parse(os.environ["PROGSCALE_POISON"])

    def train_step(engine: Any, micro_batches: Sequence[Any], rows: int, loss: Any, *args: Any, **kwargs: Any) -> Any:
        step = inject.STATE.step
        if not poison.first <= step <= poison.last:
            return original(engine, micro_batches, rows, loss, *args, **kwargs)
        hook = None
        if engine.rank == poison.rank:
            os.write(2, f"injected on rank {engine.rank}: {poison}\n".encode())
            if poison.kind in ("loss", "gradient"):
                loss = poison.loss(loss)
            elif poison.kind == "input":
                hook = engine.module.get_input_embeddings().register_forward_hook(lambda *call: call[2] * poison.value)
            elif step == poison.first:
                poison.weight(engine)
        before = bits(engine)
        result = original(engine, micro_batches, rows, loss, *args, **kwargs)
        if hook is not None:
            hook.remove()
        seen = {"step": step, "fault": result.fault, "ranks": list(result.ranks), "changed": bits(engine) != before}
        with (Path(os.environ["PROGSCALE_POISON_OUT"]) / str(engine.rank)).open("a") as file:
            file.write(json.dumps(seen) + "\n")
        return result

    return train_step


patches.add("progscale.engine.base", "Engine.train_step", poisoned)
