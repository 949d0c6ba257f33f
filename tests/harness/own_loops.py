"""Somebody's own loop over Accelerate with progscale's stages, on the data of tests.harness.cases. Runs in a rank or alone."""

from __future__ import annotations

import copy
import os

import torch

from progscale.engine.launch import find_compiler, set_up_cpu
from progscale.integrations.accelerate import Progressive
from tests.harness.cases import deepspeed_of, masters, reset_accelerate, share
from tests.harness.trainers import Shown, alive
from tests.tiny import tiny_model

STEPS, ROWS = 6, 8


def run_loop(
    engine: str = "plain",
    *,
    schedule: str = "progtuning",
    embeddings: str = "always",
    stop_at: int | None = None,
    resume_at: int = 0,
    folder: str | None = None,
    flip: bool = False,
) -> Shown:
    """Trains the tiny model of `cases.run` in a loop as one writes it.

    Args:
        engine: a key of cases.ENGINES.
        schedule: its name.
        embeddings: when they are trained.
        stop_at: save the state after so many steps, and stop.
        resume_at: load the state of so many steps.
        folder: of the state.
        flip: change a frozen weight on the way, behind everybody's back.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    set_up_cpu(1)
    reset_accelerate()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    config = copy.deepcopy(deepspeed_of(engine))
    plugin = None
    if config is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        find_compiler()
        config |= {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1, "steps_per_print": 10**9}
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    model = tiny_model("bert", blocks=6).train()
    # On a machine without a GPU Accelerate finds DeepSpeed's ranks by the backend's name alone.
    group = InitProcessGroupKwargs(backend="gloo" if plugin is not None else None)
    accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin, kwargs_handlers=[group])
    rank, world_size = accelerator.process_index, accelerator.num_processes if engine != "plain" else 1
    stages = Progressive(
        accelerator,
        model,
        total_steps=STEPS,
        stages=3,
        lr=1e-3,
        schedule=schedule,
        embeddings=embeddings,  # type: ignore[arg-type]
        micro_batch_size=ROWS // world_size,
        steps_done=resume_at,
    )
    if resume_at:
        accelerator.load_state(folder)
    shown = Shown(resumed_at=resume_at)
    for step in range(resume_at, stop_at or STEPS):
        (batch,) = share(step, ROWS, 101, rank, world_size, ROWS // world_size)
        wrapped, optimizer = stages.at(step, lr=1e-3 / (step + 1))
        if flip and step == STEPS - 1:
            with torch.no_grad():
                next(parameter for name, parameter in model.named_parameters() if "layer.0." in name).view(-1)[0] += 1
        loss = torch.nn.functional.cross_entropy(wrapped(**batch.inputs).logits.float(), batch.labels["labels"])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown.losses.append(float(accelerator.gather(loss.detach().view(1)).mean()))
    if stop_at is not None:
        accelerator.save_state(folder)
        return shown
    shown.outcomes = [outcome.to_json() for outcome in stages.finish()]
    made = stages._stages.engine
    assert made is not None
    whole = {name: value.clone() for name, value in made.full_parameters() if value is not None}
    shown.parameters = whole | {name: value.view_as(whole[name]) for name, value in masters(made).items() if whole}
    shown.engines = alive()
    return shown
