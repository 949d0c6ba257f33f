"""What can be read off a few steps of plain fine-tuning: the gradient's norm in each block, and how far its weights move."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from progscale.config import Config, config_hash, dump_config, load_config
from progscale.contribution.result import Proxies
from progscale.errors import ProgscaleError
from progscale.inputs import Permissions
from progscale.loop import seed_step
from progscale.registry import import_plugin
from progscale.session import Session
from progscale.setup import prepare

log = logging.getLogger("progscale")

Place = tuple[str, int]


def proxies_of(config: Config, steps: int, folder: Path, options: Sequence[str], gpus: Sequence[str]) -> Proxies:
    """Those that lie in the folder from before, where they are of the same run; else they are measured, and kept there.

    They are measured by a process of its own, which leaves the GPU when it ends.

    Args:
        config: of the run; one rank, no stages.
        steps: optimizer steps.
        folder: of the contribution.
        options: further ones of train.
        gpus: to use; none leaves them as they are.

    Raises:
        ProgscaleError: the process failed; it has said why.
    """
    kept = folder / "proxies.json"
    key = f"{config_hash(config)}, {steps} steps"
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["key"] == key:
            return Proxies(content["steps"], content["gradient_norm"], content["weight_change"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged: the proxies are measured anew", kept)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="progscale-proxies-") as scratch:
        request = Path(scratch) / "config.json"
        request.write_text(json.dumps(dump_config(config)), encoding="utf-8")
        command = [sys.executable, "-m", "progscale.contribution.proxies", str(request), str(steps), scratch, *options]
        environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        print(f"proxies: {steps} steps with every block trained", flush=True)
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
        if code != 0:
            raise ProgscaleError(f"--proxy-steps: the {steps} steps ended with exit code {code}; --proxy-steps 0 leaves them out")
        content = json.loads((Path(scratch) / "proxies.json").read_text(encoding="utf-8"))
    kept.write_text(json.dumps({"key": key, **content}, indent=2) + "\n", encoding="utf-8")
    return Proxies(content["steps"], content["gradient_norm"], content["weight_change"])


def main(arguments: Sequence[str]) -> int:
    """The process that measures: config file, steps, folder, and options of train."""
    request, steps, folder, *options = arguments
    for flag, module in itertools.pairwise(options):
        if flag == "--plugin":
            import_plugin(module)
    permissions = Permissions("--allow-pickle" in options, "--trust-remote-code" in options)
    found = measure_proxies(load_config([request]), int(steps), folder, permissions)
    (Path(folder) / "proxies.json").write_text(json.dumps(asdict(found)), encoding="utf-8")
    return 0


def measure_proxies(config: Config, steps: int, folder: str, permissions: Permissions) -> Proxies:
    """Takes a few steps with every block trained, in this process, and looks at the blocks.

    Args:
        config: of the run; one rank, no stages.
        steps: optimizer steps.
        folder: in which the run's folder is made.
        permissions: of the command line.

    Returns:
        By block: the mean over the steps of the gradient's L2 norm before clipping, and ‖w_n - w_0‖ / ‖w_0‖ after the last one.
    """
    values = dump_config(config)
    values["schedule"] = {"name": "none", "stages": 1, "embeddings": config.schedule.embeddings}
    values["engine"] = {}
    values["cache"] = {}
    values["trackers"] = {}
    values["run"] |= {"name": "proxies", "output_dir": folder}
    values["train"] |= {"max_steps": steps, "save_model": "none", "micro_batch_size": None}
    # The curve of the learning rate is that of so many steps; its warm-up would leave the weights where they are.
    values["optimizer"] |= {"lr_schedule": "constant", "warmup_steps": None, "warmup_fraction": None, "final_lr_fraction": 0.0}
    session = prepare(load_config([values]), permissions)
    assert isinstance(session, Session)
    try:
        return look(session)
    finally:
        session.finished = True
        session.close()


def look(session: Session) -> Proxies:
    """The steps of the session's only stage."""
    (build,) = session.builds
    engine = session.engine
    session.begin_stage(build, 0)
    places: dict[str, Place] = {
        info.name: (info.stack, info.block)
        for info in session.partition.parameters.values()
        if info.stack is not None and info.block is not None and info.name in build.live
    }
    before = {name: engine.parameters[name].detach().clone() for name in places}
    gradients: dict[str, torch.Tensor] = {}
    sums: dict[Place, float] = defaultdict(float)

    def scale() -> float:
        # fp16 gradients are scaled while they are summed up.
        state = engine.scaler_state()
        return 1.0 if state is None else float(state["loss_scale"])

    def keep(name: str, parameter: Any) -> None:
        # What has been summed up over the micro-batches so far: the last call has the whole.
        gradients[name] = (parameter.grad.detach().float() / scale()).square().sum()

    handles = [
        engine.parameters[name].register_post_accumulate_grad_hook(lambda parameter, name=name: keep(name, parameter))
        for name in places
    ]
    taken = 0
    for step, batch in session.batches(build.stage, 0):
        gradients.clear()
        seed_step(session.config.run.seed, step, engine.rank)
        engine.train_step(batch.micro_batches, batch.weight, session.task.loss, session.learning_rate(step))
        taken += 1
        for place, total in by_place(gradients.items(), places).items():
            sums[place] += total**0.5
    for handle in handles:
        handle.remove()
    moved = by_place(
        ((name, (engine.parameters[name].detach() - old).float().square().sum()) for name, old in before.items()), places
    )
    size = by_place(((name, old.float().square().sum()) for name, old in before.items()), places)
    order = list(
        itertools.chain.from_iterable([(stack, block) for block in range(n)] for stack, n in session.partition.num_blocks.items())
    )
    return Proxies(
        steps=taken,
        gradient_norm=[sums[place] / taken for place in order],
        weight_change=[(moved.get(place, 0.0) / size[place]) ** 0.5 if size.get(place) else 0.0 for place in order],
    )


def by_place(values: Iterable[tuple[str, torch.Tensor]], places: dict[str, Place]) -> dict[Place, float]:
    """Sums over the tensors of each block."""
    found: dict[Place, float] = defaultdict(float)
    for name, value in values:
        found[places[name]] += float(value)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
