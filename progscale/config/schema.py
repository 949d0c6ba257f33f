"""What a run is: one class for each section, every option with its unit, range and default.

Names that users can register (task, method, schedule, optimizer, model family) are plain strings here: who holds the
registry checks them.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

# Far above any real run, far below what a float or an int64 holds exactly.
Count = Annotated[int, Field(ge=1, le=10**12)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
# As long as a path can be.
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Share = Annotated[float, Field(gt=0, lt=1)]


def _list_or_object(value: Any) -> str:
    return "object" if isinstance(value, dict) else "list"


Item = TypeVar("Item")
FilledList = Annotated[list[Item], Field(min_length=1)]
# One list for every stack of blocks, or one for each by the stack's name.
ListOrByStack = Annotated[
    Annotated[FilledList[Item], Tag("list")] | Annotated[dict[Text, FilledList[Item]], Field(min_length=1), Tag("object")],
    Discriminator(_list_or_object),
]

# More stages than any schedule has a use for; a plan has a line for each.
MOST_STAGES = 10_000
# Names of folders end here on all common file systems; what is put beside a run or below it needs some room.
NAME_BYTES, FOLDER_BYTES = 255, 3000

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
SQUAD_TASKS = ("squad-v1", "squad-v2")
PAGED_OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit")
ADAM_OPTIMIZERS = ("adamw", "adamw_8bit", *PAGED_OPTIMIZERS)
LION_OPTIMIZERS = ("lion", "lion_8bit")
LANGUAGE_TASKS = ("causal_lm", "summarization")


class Section(BaseModel):
    """Base of all sections: unknown keys, NaN and values of another type are faults; nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Run(Section):
    """Name, folder and seed of the run."""

    name: Text | None = Field(default=None, description="folder of the run below output_dir; null: {task}-{schedule}-{seed}")
    output_dir: Text = Field(default="runs", description="folder that holds the run folders; ~ is your home")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="seed of weights, dropout and the order of the data")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="CPU threads of each rank; null: the node's cores / its ranks"
    )

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, name: str | None) -> str | None:
        if name is not None and (name in (".", "..") or any(c in name for c in "/\\\0") or len(os.fsencode(name)) > 200):
            raise PydanticCustomError("said", "must be one folder name: no slash, not '..', at most 200 bytes")
        return name

    @field_validator("output_dir")
    @classmethod
    def _is_folder(cls, folder: str) -> str:
        # No shell has seen the value of a file, and few expand what follows a `=`.
        path = os.path.expanduser(folder)
        if path.startswith("~"):
            raise PydanticCustomError("said", "names no user's home; write './~…' for a folder that is called so")
        size, longest = len(os.fsencode(path)), max(len(os.fsencode(part)) for part in path.split("/"))
        if "\0" in path or size > FOLDER_BYTES or longest > NAME_BYTES:
            raise PydanticCustomError(
                "said", f"must be a folder's path: no NUL, at most {FOLDER_BYTES} bytes, {NAME_BYTES} between two slashes"
            )
        return path


class Model(Section):
    """Which model, and where it comes from."""

    name: Text | None = Field(
        default=None, description="hub id, local folder or well-known architecture; null: the demo's tiny encoder"
    )
    revision: Text | None = Field(default=None, description="hub revision (branch, tag or commit); null: the default branch")
    family: Text | None = Field(default=None, description="registered model family, or generic; null: found by the model's type")
    random_weights: bool = Field(default=False, description="build from the model's config alone, without its weights")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description='entries of the transformers config, e.g. {"hidden_dropout_prob": 0.0}'
    )
    tokenizer: Text | None = Field(default=None, description="hub id or local folder of the tokenizer; null: the model's own")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        default="auto",
        description="transformers' implementation; auto: sdpa where the model has it; flash attention skips padding, on a GPU",
    )


class Task(Section):
    """The data and how it is scored."""

    name: Text = Field(
        default="demo",
        description=f"demo; {', '.join(GLUE_TASKS)}; {', '.join(SQUAD_TASKS)}; table, {', '.join(LANGUAGE_TASKS)}; yours",
    )
    path: Text | None = Field(default=None, description="local folder or file in the task's official format; null: the hub")
    hub: Text | None = Field(default=None, description="data set on the hub; null: the task's own")
    train_file: Text | None = Field(
        default=None, description="training data, below path if that is given (your own: csv, tsv, json, jsonl, parquet)"
    )
    validation_file: Text | None = Field(
        default=None, description="evaluation data; of your own data null sets validation_fraction of the rows aside"
    )
    text_columns: Annotated[list[Text], Field(min_length=1, max_length=2)] | None = Field(
        default=None, description="table: one column, or two for sentence pairs; causal_lm: one; null: text"
    )
    label_column: Text | None = Field(default=None, description="table: column of the label; null: label")
    labels: Annotated[list[Text], Field(min_length=2)] | None = Field(
        default=None, description="table: names of the classes in order; null: those of the data, sorted"
    )
    problem_type: Literal["classification", "regression"] | None = Field(
        default=None, description="table: what the label is; null: told by its type"
    )
    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1)] | None = Field(
        default=None, description="your own data: csv delimiter, one character; null: a comma, in .tsv a tab"
    )
    validation_fraction: Share | None = Field(
        default=None,
        description="your own data: share of the training rows kept for evaluation where there is no other for it; null: 0.1",
    )
    source_column: Text | None = Field(
        default=None, description="summarization: column of the text to read; causal_lm: of the prompt, where there are prompts"
    )
    target_column: Text | None = Field(
        default=None,
        description="summarization: column of the text to write; causal_lm: of the completion, which alone is learned",
    )
    source_prefix: Text | None = Field(
        default=None, description='summarization, causal_lm: put before every source or prompt, e.g. "summarize: " for T5'
    )
    packing: bool | None = Field(
        default=None, description="causal_lm: join the texts and cut blocks of train.max_length; false: a row each; null: true"
    )
    max_target_length: Count | None = Field(
        default=None, description="summarization, causal_lm with target_column: tokens of a target at most; null: 128"
    )
    generate: bool | None = Field(
        default=None,
        description="let the model write, and score ROUGE; null: for summarization true, for causal_lm false",
    )
    max_new_tokens: Count | None = Field(default=None, description="generate: tokens written at most; null: max_target_length")
    num_beams: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None, description="generate: beams of the search; null: 1, which takes the best token each time"
    )
    max_train_examples: Count | None = Field(default=None, description="use at most so many training examples")
    max_eval_examples: Count | None = Field(default=None, description="use at most so many examples of an evaluation split")
    metric: Text | None = Field(
        default=None,
        description="metric that decides which model is best, or evaluate:NAME (with --trust-remote-code); null: the task's own",
    )
    doc_stride: Count = Field(default=128, description="squad: tokens that two windows of a long context share")
    n_best: Count = Field(default=20, description="squad: candidate answers kept of each window")
    max_answer_length: Count = Field(default=30, description="squad: longest answer, in tokens")
    no_answer_threshold: float | Literal["auto"] = Field(
        default="auto",
        description='squad-v2: how far "no answer" must score above the best span; auto: 0 (best_f1 is that of the best one)',
    )


class Method(Section):
    """What is trained inside a block."""

    name: Text = Field(
        default="full",
        description="full (all tensors of a live block), adapter, bitfit, lora, qlora, or registered",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description='the method\'s own, e.g. {"rank": 16} for lora; they are listed below'
    )


class Schedule(Section):
    """Which blocks are trained when."""

    name: Text = Field(
        default="progtuning",
        description="progtuning, none (plain fine-tuning), without_low_blocks, growing, custom, weighted, only, or registered",
    )
    stages: Annotated[int, Field(ge=1, le=MOST_STAGES)] | None = Field(
        default=None,
        description="number of stages T; null: as many as first_blocks or starts list, else the epochs, rounded up",
    )
    embeddings: Literal["always", "first_stage", "never"] = Field(default="always", description="when the embeddings are trained")
    first_blocks: ListOrByStack[CountOrZero] | None = Field(
        default=None,
        description='custom: the lowest trained block of each stage, e.g. [0, 4, 8]; by stack {"encoder": […], "decoder": […]}',
    )
    starts: Annotated[list[CountOrZero], Field(min_length=1)] | None = Field(
        default=None, description="optimizer step at which each stage begins, the first 0; null: evenly spread"
    )
    block_weights: ListOrByStack[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="weighted: one positive weight for each block; by stack where a model has several"
    )
    frozen_mode: Literal["train", "eval"] | None = Field(
        default=None,
        description="blocks below all that is trained: train (dropout on, the paper's way) or eval; null: eval with a cache",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description='only: {"blocks": [3]}, the blocks that are trained; else those of a schedule of yours'
    )

    @property
    def listed_stages(self) -> int | None:
        """The number of stages that `first_blocks` or else `starts` lists."""
        firsts = self.first_blocks
        listed = next(iter(firsts.values())) if isinstance(firsts, dict) else firsts or self.starts
        return len(listed) if listed else None


class Optimizer(Section):
    """The optimizer and its learning-rate curve, a closed form of the optimizer step."""

    name: Text = Field(
        default="adamw",
        description="adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, lion, lion_8bit (docs/optimizers.md), or registered",
    )
    lr: float = Field(default=2e-5, gt=0, le=100, description="learning rate after warm-up (the demo alone: 5e-4)")
    weight_decay: float = Field(default=0.01, ge=0, le=100, description="decoupled weight decay")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.999],
        description="decay rates of Adam's two moments; for lion of update and moment, by default [0.9, 0.99]",
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="added to Adam's denominator; lion has none")
    options: dict[str, Any] = Field(default_factory=dict, description="options of an optimizer from another package")
    decay_bias_and_norm: bool = Field(default=False, description="apply weight decay to biases and normalisation weights too")
    lr_schedule: Literal["linear", "cosine", "polynomial", "constant"] = Field(
        default="linear", description="shape of the curve after warm-up"
    )
    warmup_steps: CountOrZero | None = Field(default=None, description="optimizer steps of the linear rise from 0")
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="the same as a share of the run's steps; give only one of the two"
    )
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="share of lr that is left at the last step")
    power: float = Field(default=1.0, gt=0, le=100, description="exponent of the polynomial curve")
    restart_each_stage: bool = Field(default=False, description="begin the whole curve anew in each stage")

    @model_validator(mode="before")
    @classmethod
    def _betas_of_lion(cls, values: Any) -> Any:
        """Lion's own betas (arXiv 2302.06675), where none are given: its second one stands for something else than Adam's."""
        if isinstance(values, dict) and values.get("name") in LION_OPTIMIZERS:
            return {"betas": [0.9, 0.99], **values}
        return values


class Train(Section):
    """Length of the run, batches, precision and evaluation."""

    epochs: float = Field(default=3.0, gt=0, le=1e6, description="passes over the training data; 0.5 is half a pass")
    max_steps: Count | None = Field(default=None, description="stop after so many optimizer steps, whatever the epochs")
    micro_batch_size: Count | Literal["auto"] | None = Field(
        default=None, description="rows a rank runs at once; null: its share of the batch, at most 32; auto: what memory holds"
    )
    memory_gigabytes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="auto: 10^9 bytes for a rank's micro-batch; null: 85 % of what is free when a stage begins"
    )
    global_batch_size: Count = Field(default=32, description="rows of an optimizer step, over all ranks")
    gradient_accumulation_steps: Count | None = Field(
        default=None, description="refuse to start unless a rank runs just so many micro-batches a step; null: no check"
    )
    max_tokens_per_micro_batch: Count | None = Field(
        default=None, description="split a rank's rows also by padded tokens; changes memory and speed, not the result"
    )
    eval_batch_size: Count = Field(default=64, description="rows a rank evaluates at once")
    max_length: Count = Field(default=128, description="tokens of a row; longer ones are cut or, for squad, windowed")
    precision: Literal["fp32", "bf16", "bf16_params", "fp16"] = Field(
        default="fp32",
        description="bf16: fp32 parameters under autocast; bf16_params: bf16 parameters with fp32 masters (DeepSpeed)",
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    compile: Literal["off", "inductor", "aot_eager"] = Field(
        default="off",
        description="torch.compile each block, anew in each stage, with this backend (aot_eager: traced alone); not under ZeRO-3",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="clip the gradient to this global norm; null: never"
    )
    group_by_length: bool = Field(default=True, description="form batches of rows of similar length")
    num_workers: Annotated[int, Field(ge=0, le=1024)] = Field(default=0, description="data loader processes of each rank")
    logging_steps: Count = Field(default=10, description="optimizer steps between two records in metrics.jsonl")
    evaluate: Literal["epoch", "stage", "end"] = Field(default="epoch", description="when to evaluate; always at the end")
    save_model: Literal["best", "last", "none"] = Field(default="best", description="which weights go to the model folder")
    nonfinite: str = Field(default="stop", description="NaN or infinite loss or gradient: stop, or skip:N steps in a row")
    fused_optimizer: bool | None = Field(default=None, description="adamw: torch's fused kernel; null: where the device has one")

    @field_validator("nonfinite")
    @classmethod
    def _is_policy(cls, policy: str) -> str:
        word, _, number = policy.partition(":")
        digits = number.isascii() and number.isdecimal() and len(number) <= 9 and number[:1] != "0"
        if policy != "stop" and not (word == "skip" and digits):
            raise PydanticCustomError("said", "must be 'stop' or 'skip:N' with N at least 1, e.g. 'skip:3'")
        return policy


class Engine(Section):
    """What runs the stages on one or many ranks."""

    name: Literal["auto", "plain", "ddp", "deepspeed"] = Field(
        default="auto", description="auto: deepspeed where engine.deepspeed is given, else ddp on several ranks, else plain"
    )
    deepspeed: dict[str, Any] | None = Field(
        default=None, description='a DeepSpeed config, literally; batch, clipping and bucket sizes may be "auto"'
    )
    by_stage: dict[str, dict[str, Any]] | None = Field(
        default=None,
        description='DeepSpeed keys that differ by stage, e.g. {"1": {"zero_optimization": {"stage": 1}}}; "2-4", "3-": several',
    )
    timeout_seconds: Count = Field(default=600, description="give up when a rank is silent for so long")
    preflight: Literal["auto", "off"] = Field(
        default="auto", description="auto: on several machines see before the run who has come, who reaches whom, and how fast"
    )


class Cache(Section):
    """What the frozen blocks give for each row is computed once and read afterwards."""

    storage: Literal["off", "auto", "ram", "pinned", "disk"] = Field(
        default="off",
        description="where: memory (on a GPU machine page-locked: pinned), a file on disk; auto: memory, else disk; off: nowhere",
    )
    dtype: Literal["same", "bf16", "fp16"] = Field(
        default="same", description="same: as the first trained block receives it; the others are smaller, and not exact"
    )
    budget_gigabytes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="of a node at most (10^9 bytes); null: half of what is free"
    )
    path: Text | None = Field(default=None, description="disk: folder, on each node best a local one; null: in the run's folder")


class Checkpoint(Section):
    """When the state of the run is saved, so that it can go on after whatever stops it."""

    every_steps: Count | None = Field(default=None, description="save after every so many optimizer steps; null: not by steps")
    at_epochs: bool = Field(default=True, description="save at the end of each epoch")
    at_stages: bool = Field(default=True, description="save at the end of each stage")
    keep: Annotated[int, Field(ge=2, le=10**6)] = Field(default=2, description="newest checkpoints kept, older ones are deleted")
    background: bool = Field(
        default=False,
        description="copy the state and write it while training goes on; needs memory for one copy of a rank's part",
    )
    shard_megabytes: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=256, description="size of a file at most; also the memory that a save needs beside the state"
    )
    on_error: Literal["stop", "warn"] = Field(
        default="stop", description="when a checkpoint cannot be written (disk full): end the run, or say so and go on"
    )


class Trackers(Section):
    """Services that are told the run's figures, through Accelerate; one that fails never stops a run."""

    names: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = Field(
        default_factory=list, description='which, e.g. ["tensorboard"]; each needs its package (docs/tracking.md)'
    )
    project: Text = Field(default="progscale", description="MLflow's experiment, the project of wandb and trackio")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description='what a service\'s own start takes, e.g. {"wandb": {"tags": ["bert"]}}'
    )


class Config(Section):
    """A whole run. `load_config` builds it; by hand, `Config(train=Train(epochs=2))` takes every other default."""

    description: str | None = Field(default=None, description="what a layer is for, and where its values come from")
    run: Run = Field(default_factory=Run)
    model: Model = Field(default_factory=Model)
    task: Task = Field(default_factory=Task)
    method: Method = Field(default_factory=Method)
    schedule: Schedule = Field(default_factory=Schedule)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    train: Train = Field(default_factory=Train)
    engine: Engine = Field(default_factory=Engine)
    cache: Cache = Field(default_factory=Cache)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    trackers: Trackers = Field(default_factory=Trackers)

    @property
    def run_name(self) -> str:
        """`run.name`, or `{task}-{schedule}-{seed}`."""
        return self.run.name or f"{self.task.name}-{self.schedule.name}-{self.run.seed}".replace("/", "-")

    @property
    def frozen_mode(self) -> Literal["train", "eval"]:
        """`schedule.frozen_mode`, or what the cache needs."""
        return self.schedule.frozen_mode or ("train" if self.cache.storage == "off" else "eval")

    def deepspeed_of(self, stage: int) -> dict[str, Any] | None:
        """The DeepSpeed config of a stage (1-based): `engine.deepspeed` with what `engine.by_stage` has for it."""
        from progscale.config.stages import deepspeed_of

        return deepspeed_of(self.engine.deepspeed, self.engine.by_stage, stage)

    def for_stage(self, stage: int) -> Config:
        """The config whose engine is that of a stage (1-based) in all of them."""
        engine = self.engine.model_copy(update={"deepspeed": self.deepspeed_of(stage), "by_stage": None})
        return self.model_copy(update={"engine": engine})

    @property
    def schedule_label(self) -> str:
        """The schedule's name, and what is not the paper's way, as tables show it."""
        return self.schedule.name + (" (frozen blocks in eval mode)" if self.frozen_mode == "eval" else "")

    @property
    def stages(self) -> int:
        """The number of stages T: `schedule.stages`, else the length of its lists, else the epochs rounded up."""
        return self.schedule.stages or self.schedule.listed_stages or math.ceil(self.train.epochs)


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
