"""transformers' Trainer made progressive, on the data of tests.harness.cases, and what it shows. Runs in a rank or alone."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from progscale.engine.launch import find_compiler, set_up_cpu
from progscale.integrations.transformers import make_progressive
from tests.harness.cases import deepspeed_of, masters, reset_accelerate, share
from tests.tiny import tiny_model


@dataclass
class Shown:
    """What a Trainer's run showed on this rank.

    Attributes:
        losses: of each optimizer step, mean over ranks.
        grad_norms: before clipping.
        learning_rates: that the optimizer took.
        parameters: whole, after the last step, on rank 0.
        outcomes: of the stages.
        engines: live DeepSpeed engines or DDP wrappers after training.
        resumed_at: the step that the run began with.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    engines: int = 0
    resumed_at: int = 0


class Steps(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of all ranks in the order in which the Trainer's sampler deals them out: an item is a whole micro-batch."""

    def __init__(self, steps: int, rows: int, vocabulary: int, world_size: int, micro: int) -> None:
        per_rank = [
            [batch for step in range(steps) for batch in share(step, rows, vocabulary, rank, world_size, micro)]
            for rank in range(world_size)
        ]
        self.items = [batch for together in zip(*per_rank, strict=True) for batch in together]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.items[index].inputs, "labels": self.items[index].labels["labels"]}


class InOrder(Trainer):
    """A Trainer that takes its rows in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class Watch(TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.shown.losses.append(logs["loss"])
            self.shown.grad_norms.append(float(logs["grad_norm"]))
            self.shown.learning_rates.append(logs["learning_rate"])


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy, the mean over the rows of the global batch; the Trainer's own for classifiers sums over micro-batches."""
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss / num_items_in_batch


def first(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of one item, which is a whole micro-batch."""
    return batch[0]


def run_trainer(
    engine: str = "plain",
    *,
    family: str = "bert",
    schedule: str = "progtuning",
    embeddings: str = "always",
    stages: int | None = 3,
    steps: int = 6,
    rows: int = 8,
    micro: int = 2,
    blocks: int = 6,
    precision: str = "fp32",
    options: dict[str, Any] | None = None,
    save_at: int | None = None,
    resume: str | None = None,
    folder: str | None = None,
    progressive: bool = True,
    adapter: bool = False,
    gather: bool = False,
    callback: TrainerCallback | None = None,
    **arguments: Any,
) -> Shown:
    """Trains the tiny model of `cases.run` with the Trainer.

    Args:
        engine: a key of cases.ENGINES.
        save_at: save a checkpoint after so many steps, and stop there.
        resume: folder of a checkpoint to go on from.
        folder: of the Trainer.
        adapter: train PEFT's LoRA.
        gather: ZeRO-3 puts whole weights into checkpoints.
        progressive: False leaves the Trainer as it is.
        callback: one more.
        **arguments: further TrainingArguments.
    """
    set_up_cpu(1)
    reset_accelerate()
    # Under ZeRO-3 transformers draws the weights of a model in another order, once it knows of it.
    module: Any = tiny_model(family, blocks=blocks).train()
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        module = get_peft_model(module, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    config = copy.deepcopy(deepspeed_of(engine))
    if config is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        find_compiler()
        config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
        config |= {"bf16": {"enabled": "auto"}, "steps_per_print": 10**9}
        if gather and config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if engine != "plain" else 1
    own = folder or tempfile.mkdtemp(prefix="progscale-trainer-")
    args = TrainingArguments(
        output_dir=own,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=rows // (world_size * micro),
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=1,
        weight_decay=0.01,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="steps" if save_at else "no",
        save_steps=save_at or 500,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        deepspeed=config,
        ddp_backend="gloo" if engine != "plain" else None,
        bf16=precision.startswith("bf16"),
        dataloader_pin_memory=False,
        seed=0,
        **arguments,
    )
    shown = Shown()
    data = Steps(steps, rows, int(module.config.vocab_size), world_size, micro)
    trainer = InOrder(
        module, args, train_dataset=data, data_collator=first, callbacks=[Watch(shown)], compute_loss_func=mean_loss
    )
    made = None
    if progressive:
        made = make_progressive(trainer, schedule=schedule, stages=stages, embeddings=embeddings, schedule_options=options)
    if save_at is not None:
        trainer.add_callback(StopAfter(save_at))
    if callback is not None:
        trainer.add_callback(callback)
    result = trainer.train(resume_from_checkpoint=resume)
    assert result.global_step == (save_at or steps)
    if made is not None:
        assert made.stages is not None and made.stages.engine is not None
        shown.outcomes = [outcome.to_json() for outcome in made.outcomes]
        shown.parameters = {name: value.clone() for name, value in made.stages.engine.full_parameters() if value is not None}
        shown.parameters |= {
            name: value.view_as(shown.parameters[name]) for name, value in masters(made.stages.engine).items() if shown.parameters
        }
    else:
        shown.parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    shown.engines = alive()
    if folder is None:
        shutil.rmtree(own, ignore_errors=True)
    return shown


class StopAfter(TrainerCallback):
    """Ends the run where its checkpoint is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True
        return control


def tuples_by_stage(engine: str) -> list[bool]:
    """In each stage under bf16 autocast: whether the model still takes `return_dict`, which a decorator of its forward reads."""
    found: list[bool] = []

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            if state.global_step % 2 == 0:
                batch = share(0, 2, 101, 0, 1, 2)[0]
                with torch.no_grad():
                    found.append(isinstance(model(**batch.inputs, return_dict=False), tuple))

    run_trainer(engine, precision="bf16", callback=Asks())
    return found


def alive() -> int:
    """DeepSpeed engines and DDP wrappers that have not been collected."""
    import gc

    from torch.nn.parallel import DistributedDataParallel

    gc.collect()
    kinds: tuple[type, ...] = (DistributedDataParallel,)
    try:
        from deepspeed.runtime.engine import DeepSpeedEngine

        kinds += (DeepSpeedEngine,)
    except ImportError:
        pass
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


def main() -> None:
    """By hand: torchrun --nproc_per_node 2 -m tests.harness.trainers zero2."""
    import sys

    shown = run_trainer(sys.argv[1] if len(sys.argv) > 1 else "plain")
    print(shown.losses, shown.grad_norms, shown.learning_rates, shown.outcomes, shown.engines, sep="\n")


if __name__ == "__main__":
    main()
