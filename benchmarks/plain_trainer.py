"""Plain fine-tuning with transformers' own Trainer, from the same config as a progscale run.

    python benchmarks/plain_trainer.py --config configs/tasks/mrpc.json --set model.name=FOLDER --set task.path=GLUE/MRPC
    (and --set train.precision=bf16, --output summary.json, …)

One process on the CPU. Tokenised splits, padding, the head's first weights (same seed), loss and scores are progscale's own;
batches (at random, not grouped by length), optimizer, curve, clipping and autocast are the Trainer's. The result has the scores
after the last step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine, write_json
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from progscale.cli import quiet_libraries, read_config
from progscale.config import Config
from progscale.data import collate, eval_batches, evaluate_task, pad_values
from progscale.engine.launch import set_up_cpu
from progscale.engine.loading import load_module
from progscale.inputs import Permissions, model_request, tokenizer_of
from progscale.models.loading import find_family
from progscale.tasks.base import TASKS, Task, Tokenized


class Rows(Dataset[int]):
    """Row numbers; the collator makes the batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        return row


class TaskTrainer(Trainer):
    """The Trainer with a progscale task's loss: the mean over the rows of the batch."""

    task: Task

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch, and the outputs where they are asked for."""
        names = ("labels", "start_positions", "end_positions")
        labels = {name: inputs[name] for name in names if name in inputs}
        outputs = model(**{name: value for name, value in inputs.items() if name not in names})
        loss = self.task.loss(outputs, labels).mean()
        return (loss, outputs) if return_outputs else loss


def load(config: Config) -> tuple[Task, Any, torch.nn.Module]:
    """Task, tokenizer and model of a config, seeded as progscale does it."""
    task = TASKS.get(config.task.name)(config.task, seed=config.run.seed)
    request = model_request(config, task, Permissions())
    family = find_family(request, config.model.family)
    tokenizer = tokenizer_of(config, family, Permissions())
    torch.manual_seed(config.run.seed)
    return task, tokenizer, load_module(request, family, None)


def arguments(config: Config, folder: str) -> TrainingArguments:
    """The Trainer's arguments that say what the config says."""
    optimizer, train = config.optimizer, config.train
    return TrainingArguments(
        output_dir=folder,
        seed=config.run.seed,
        use_cpu=True,
        bf16=train.precision == "bf16",
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.global_batch_size,
        learning_rate=optimizer.lr,
        lr_scheduler_type=optimizer.lr_schedule,
        # A number below 1 is a share of the steps.
        warmup_steps=optimizer.warmup_steps or optimizer.warmup_fraction or 0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        # 0 is the Trainer's word for no clipping.
        max_grad_norm=train.max_grad_norm or 0.0,
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )


def score(
    model: torch.nn.Module, task: Task, splits: dict[str, Tokenized], padding: dict[str, int], config: Config
) -> dict[str, float]:
    """The task's metrics on every evaluation split, each row once."""
    model.eval()
    scores: dict[str, float] = {}
    for name, split in splits.items():
        if name == "train":
            continue
        predictions: dict[int, Any] = {}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            for batch in eval_batches(split, config.train.eval_batch_size, 1, 0, pad=padding):
                rows = batch.rows.tolist()
                predictions.update(zip(rows, task.predict(model(**batch.inputs), rows, split), strict=True))
        scores |= evaluate_task(task, split, name, predictions)
    return scores


def train(config: Config) -> dict[str, Any]:
    """Trains and scores; the keys are those of progscale's summary.json."""
    start = time.perf_counter()
    set_up_cpu(config.run.threads)
    task, tokenizer, model = load(config)
    splits, padding = task.tokenize(tokenizer, config.train.max_length), pad_values(tokenizer)

    def batch(rows: list[int]) -> dict[str, torch.Tensor]:
        made = collate(splits["train"], torch.tensor(rows).numpy(), padding)
        return {**made.inputs, **made.labels}

    with tempfile.TemporaryDirectory() as folder:
        trainer = TaskTrainer(
            model=model, args=arguments(config, folder), train_dataset=Rows(len(splits["train"])), data_collator=batch
        )
        trainer.task = task
        outcome = trainer.train()
    metrics = score(model, task, splits, padding, config)
    return {
        "task": task.name,
        "schedule": "trainer",
        "world_size": 1,
        "metrics": metrics,
        "train_seconds": outcome.metrics["train_runtime"],
        "total_seconds": time.perf_counter() - start,
        "steps": outcome.global_step,
        "threads": torch.get_num_threads(),
        "seed": config.run.seed,
        **machine(),
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="JSON layer; later ones win")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one config value")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    options.plugin = []
    quiet_libraries()
    result = train(read_config(options))
    print(result["metrics"])
    write_json(options.output, result)


if __name__ == "__main__":
    main()
