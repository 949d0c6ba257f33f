"""progscale beside Lightning with its finetuning callback, which freezes the same parts at the same epochs.

    pip install lightning
    python benchmarks/lightning_speed.py                            BERT-base shape, bf16, four rows
    python benchmarks/lightning_speed.py --rows first_stage --steps-per-epoch 16

Lightning's Trainer runs a subclass of its BaseFinetuning, which freezes blocks (and embeddings) when the epoch of a stage begins.
It is tuned: fused AdamW (for which its own clipping must be replaced: it refuses both together), bf16-mixed precision, no logger,
no checkpoints, batches that are collated already. progscale takes the same. Both are in one process and take turns step by
step; Lightning's time runs from the end of the other side's step to the end of its own: what it does between steps counts. Of
progscale it is the engine's step, without the loader and the meters of a run (`vs bare` in trainer_overhead.py has those).

The ratio is that of the sums over the run, below 1 where progscale takes less; switches are left out on both sides. Lightning has
no cache: `cache-10` shows what one gives.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine, random_encoder, show_machine, show_table, write_json
from stage_speed import ROWS, Row, Side
from workload import CLIP, DECAY, LR, row_loss, synthetic

from progscale.cli import quiet_libraries
from progscale.data import GlobalBatch
from progscale.engine.launch import set_up_cpu
from progscale.engine.loading import load_module
from progscale.models.loading import find_family
from progscale.optim import StageBuild

OWN_ROWS = {"none": Row(3, 1, "always")} | {name: ROWS[name] for name in ("always", "first_stage", "cache-10")}


def lightning_run(
    model: torch.nn.Module, builds: Sequence[StageBuild], epochs: Sequence[list[GlobalBatch]], ours: Side
) -> list[float]:
    """Seconds of Lightning's steps; after each of them `ours` takes the same."""
    import lightning
    from lightning.pytorch.callbacks import BaseFinetuning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: GlobalBatch, index: int) -> torch.Tensor:
            (micro,) = batch.micro_batches
            return row_loss(self.model(**micro.inputs), micro.labels).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = list(self.model.parameters())
            decayed, rest = ([p for p in parameters if (p.dim() > 1) == matrix] for matrix in (True, False))
            groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=LR, fused=True)

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

        def transfer_batch_to_device(self, batch: Any, device: Any, index: int) -> Any:
            return batch

    class Stages(BaseFinetuning):
        """Freezes what a stage does not train."""

        def freeze_before_training(self, pl_module: Any) -> None:
            """The first stage trains everything."""

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            for build in builds:
                if build.stage.start_step == epoch * len(epochs[0]):
                    for name, parameter in pl_module.model.named_parameters():
                        parameter.requires_grad_(name in build.live)
                        parameter.grad = None

    class Turns(lightning.Callback):
        """Lightning is the clock."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.begun = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: GlobalBatch, index: int) -> None:
            if index == 0:  # what it does between epochs, freezing too, is left out, as progscale's switch is
                self.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: GlobalBatch, index: int) -> None:
            self.seconds.append(time.perf_counter() - self.begun)
            ours.step(len(self.seconds) - 1, batch)
            self.begun = time.perf_counter()

    turns = Turns()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if ours.engine.settings.precision == "bf16" else "32-true",
        max_epochs=len(epochs),
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[Stages(), turns],
    )

    class Batches(lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            epoch = self.trainer.current_epoch if self.trainer else 0
            return torch.utils.data.DataLoader(epochs[epoch], batch_size=None)  # type: ignore[arg-type]

    trainer.fit(Classifier(), datamodule=Batches())
    return turns.seconds


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Both sides of a row."""
    row = OWN_ROWS[name]
    split = synthetic(options.batch * options.steps_per_epoch, options.max_length, 30000)
    ours = Side(options, row, split, "none" if name == "none" else "progtuning", cache=row.cache)
    request = random_encoder(options.model)
    torch.manual_seed(0)
    model = load_module(request, find_family(request, None), None).train()
    epochs = [list(ours.loader.epoch(epoch)) for epoch in range(row.epochs)]
    theirs = lightning_run(model, ours.builds, epochs, ours)
    # The very first step of a process warms up.
    ratio = sum(ours.seconds[1:]) / sum(theirs[1:])
    per_epoch = len(epochs[0])
    by_epoch = [
        sum(ours.seconds[max(1, at) : at + per_epoch]) / sum(theirs[max(1, at) : at + per_epoch])
        for at in range(0, len(theirs), per_epoch)
    ]
    return {"row": name, "ratio": ratio, "by_epoch": by_epoch, "switch_seconds": ours.switch_seconds}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(OWN_ROWS), default=list(OWN_ROWS), help="default: all")
    parser.add_argument("--model", default="bert-base-uncased", help="a well-known architecture, with random weights")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of both sides")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row at most; 53 in the mean")
    parser.add_argument("--steps-per-epoch", type=int, default=8, help="steps of an epoch")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(given)
    options.micro_batch = None
    quiet_libraries()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    set_up_cpu(options.threads)
    results = [measure(options, name) for name in options.rows]
    import lightning

    show_machine()
    print(f"lightning {lightning.__version__}, {options.model}, {options.precision}, {options.batch} rows a step")
    table = [[r["row"], r["ratio"], " ".join(f"{value:.2f}" for value in r["by_epoch"])] for r in results]
    show_table(["row", "progscale / Lightning", "by epoch"], table)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(options.output, {"settings": settings, "machine": machine(), "rows": results})


if __name__ == "__main__":
    main()
