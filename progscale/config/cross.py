"""Faults that only several options together make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

from progscale.config.read import KeyPath, dotted, show
from progscale.config.schema import (
    ADAM_OPTIMIZERS,
    GLUE_TASKS,
    LANGUAGE_TASKS,
    LION_OPTIMIZERS,
    MOST_STAGES,
    PAGED_OPTIMIZERS,
    SQUAD_TASKS,
    Config,
    Section,
)
from progscale.config.stages import stage_faults
from progscale.errors import Fault

SOURCES = ("hub", "train_file", "validation_file")
TABLE_OPTIONS = (
    "text_columns",
    "label_column",
    "labels",
    "problem_type",
    "delimiter",
    "validation_fraction",
)
# Those that the language-modelling tasks share with it.
OWN_DATA_OPTIONS = ("delimiter", "validation_fraction")
LANGUAGE_OPTIONS = (
    *("source_column", "target_column", "source_prefix", "packing"),
    *("max_target_length", "generate", "max_new_tokens", "num_beams"),
)
SQUAD_OPTIONS = ("doc_stride", "n_best", "max_answer_length", "no_answer_threshold")
OWN_SCHEDULES = ("progtuning", "none", "without_low_blocks", "growing", "custom", "weighted")


class Values(Protocol):
    """Where values come from, as the layers know it."""

    off: dict[str, str]

    @property
    def origins(self) -> Any:
        """Path → origin, with its `kind` and `source`."""
        ...

    def where(self, path: KeyPath) -> str:
        """` (from …)` for a path."""
        ...


class _Checks:
    """Collects faults; a fault about a value that is itself wrong already is left out."""

    def __init__(self, config: Config, values: Values, bad: set[KeyPath]) -> None:
        self.config = config
        self.values = values
        self.bad = bad
        self.faults: list[Fault] = []

    def value(self, key: str) -> str:
        """`10 (from my.json)`."""
        section, name = key.split(".")
        return f"{show(getattr(getattr(self.config, section), name))}{self.values.where((section, name))}"

    def got(self, key: str) -> str:
        """`optimizer.warmup_steps = 10 (from my.json)`."""
        return f"{key} = {self.value(key)}"

    def fault(self, key: str, message: str, *others: str) -> None:
        """Adds a fault at `key`, which also depends on the keys `others`."""
        if not any(tuple(one.split("."))[:2] in self.bad for one in (key, *others)):
            self.faults.append(Fault(key, message))

    def given(self, key: str) -> bool:
        """Whether an option differs from its default."""
        section, name = key.split(".")
        group = getattr(self.config, section)
        return bool(getattr(group, name) != _default(type(group), name))


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].get_default(call_default_factory=True)


def cross_faults(config: Config, values: Values, bad: set[KeyPath]) -> list[Fault]:
    """Impossible combinations of options.

    Args:
        config: every single value is allowed.
        values: for messages: which layer gave what.
        bad: paths already reported, whose stand-in values prove nothing.
    """
    checks = _Checks(config, values, bad)
    _optimizer(checks)
    _schedule(checks)
    _batches(checks)
    _engine(checks)
    _cache(checks)
    _task(checks)
    _trackers(checks)
    return checks.faults


def _optimizer(checks: _Checks) -> None:
    optimizer = checks.config.optimizer
    if optimizer.warmup_steps is not None and optimizer.warmup_fraction is not None:
        checks.fault(
            "optimizer.warmup_steps",
            f"{checks.value('optimizer.warmup_steps')} is given together with "
            f"{checks.got('optimizer.warmup_fraction')}; set one of them to null",
            "optimizer.warmup_fraction",
        )
    if optimizer.lr_schedule == "constant" and optimizer.final_lr_fraction:
        checks.fault(
            "optimizer.final_lr_fraction",
            f"{checks.value('optimizer.final_lr_fraction')} has no meaning with lr_schedule 'constant'; remove it",
            "optimizer.lr_schedule",
        )
    unused = ["optimizer.eps"] if optimizer.name in LION_OPTIMIZERS else []
    unused += ["train.fused_optimizer"] if optimizer.name in (*ADAM_OPTIMIZERS[1:], *LION_OPTIMIZERS) else []
    for key in filter(checks.given, unused):
        section, name = key.split(".")
        default = show(_default(type(getattr(checks.config, section)), name))
        checks.fault(
            key,
            f"{checks.value(key)} is not used by {checks.got('optimizer.name')}; remove it or set it to {default}",
            "optimizer.name",
        )
    if optimizer.name in (*ADAM_OPTIMIZERS, *LION_OPTIMIZERS) and optimizer.options:
        checks.fault(
            "optimizer.options", f"no options for {checks.got('optimizer.name')}: it takes none; remove them", "optimizer.name"
        )
    if optimizer.name in PAGED_OPTIMIZERS and any(
        _offloads_optimizer(checks.config.deepspeed_of(stage)) for stage in range(1, min(checks.config.stages, MOST_STAGES) + 1)
    ):
        checks.fault(
            "optimizer.name",
            f"{checks.value('optimizer.name')} pages its state out of a GPU's memory, where zero_optimization.offload_optimizer"
            f"{checks.values.where(('engine', 'deepspeed', 'zero_optimization', 'offload_optimizer'))} never puts it; "
            f"take {show(optimizer.name.removeprefix('paged_'))}, or no offload",
            "engine.deepspeed",
        )


def _offloads_optimizer(deepspeed: Any) -> bool:
    """Whether a DeepSpeed JSON, perhaps with faults of its own, keeps the optimizer's state in the CPU's memory."""
    block = _zero(deepspeed).get("offload_optimizer")
    return isinstance(block, dict) and block.get("device", "none") != "none"


def _zero(deepspeed: Any) -> dict[str, Any]:
    """The section of ZeRO in a DeepSpeed JSON, perhaps with faults of its own."""
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, dict) else None
    return zero if isinstance(zero, dict) else {}


def _schedule(checks: _Checks) -> None:
    schedule = checks.config.schedule
    needed = {"custom": "first_blocks", "weighted": "block_weights"}
    examples = {
        "first_blocks": "one first block for each stage, e.g. [0, 4, 8]",
        "block_weights": "a weight for each block",
    }
    for name, option in needed.items():
        value = getattr(schedule, option)
        key = f"schedule.{option}"
        if schedule.name == name and value is None:
            checks.fault(key, f"missing; schedule '{name}' needs {examples[option]}", "schedule.name")
        if schedule.name in OWN_SCHEDULES and schedule.name != name and value is not None:
            checks.fault(key, f"only schedule '{name}' uses it, not {checks.got('schedule.name')}; remove it", "schedule.name")
    if schedule.name in OWN_SCHEDULES and schedule.options:
        checks.fault(
            "schedule.options",
            f"no options for {checks.got('schedule.name')}: it takes none; remove them",
            "schedule.name",
        )
    for option in ("first_blocks", "starts"):
        listed = getattr(schedule, option)
        used = option == "starts" or schedule.name == "custom"
        by_stack = listed if isinstance(listed, dict) else {"": listed}
        for stack, entries in by_stack.items():
            if entries is not None and used and len(entries) != checks.config.stages:
                checks.fault(
                    f"schedule.{option}.{stack}".rstrip("."),
                    f"{len(entries)} entries{checks.values.where(('schedule', option))} for {checks.config.stages} stages; "
                    f"give one for each",
                    "schedule.stages",
                    "schedule.first_blocks",
                    "train.epochs",
                )
    if checks.config.stages > MOST_STAGES:
        listed = next((name for name in ("first_blocks", "starts") if getattr(schedule, name)), None)
        why = checks.got("train.epochs") if listed is None else f"schedule.{listed}{checks.values.where(('schedule', listed))}"
        checks.fault(
            "schedule.stages",
            f"not given, and {why} would make {checks.config.stages}; at most {MOST_STAGES} are possible",
            "train.epochs",
            "schedule.first_blocks",
            "schedule.starts",
        )
    starts = schedule.starts
    if starts is not None and (starts[0] != 0 or any(b <= a for a, b in pairwise(starts))):
        checks.fault("schedule.starts", f"{checks.value('schedule.starts')} must ascend from 0, e.g. [0, 100, 300]")


def _batches(checks: _Checks) -> None:
    train = checks.config.train
    micro, rows, accumulation = train.micro_batch_size, train.global_batch_size, train.gradient_accumulation_steps
    keys = ("train.global_batch_size", "train.micro_batch_size", "train.gradient_accumulation_steps")
    origins = checks.values.origins
    from_deepspeed = getattr(origins.get(("train", "micro_batch_size")), "kind", "") == "deepspeed"
    if micro != "auto" and train.memory_gigabytes is not None:
        memory = f'{checks.value("train.memory_gigabytes")} is for train.micro_batch_size = "auto"; remove it'
        checks.fault("train.memory_gigabytes", memory, keys[1])
    if micro == "auto":
        if accumulation is not None:
            checks.fault(
                keys[2],
                f"{checks.value(keys[2])} beside {checks.got(keys[1])}, which finds how many there are; remove it",
                keys[1],
            )
        return
    if micro is not None and from_deepspeed and ("train", "global_batch_size") not in origins:
        checks.fault(
            keys[0],
            f"missing beside {checks.got(keys[1])}; DeepSpeed would multiply by the number of processes: give "
            f"train_batch_size, or --set train.global_batch_size=…",
            keys[1],
        )
    elif micro is not None and micro > rows:
        checks.fault(keys[1], f"{checks.value(keys[1])} is above {checks.got(keys[0])}", keys[0])
    elif accumulation is not None and rows % ((micro or 1) * accumulation):
        given = " × ".join(checks.got(key) for key in keys[1:] if key != keys[1] or micro is not None)
        checks.fault(keys[0], f"{checks.value(keys[0])} is not a multiple of {given}", *keys[1:])


def _engine(checks: _Checks) -> None:
    engine, precision = checks.config.engine, checks.config.train.precision
    if engine.name in ("plain", "ddp") and engine.deepspeed is not None:
        checks.fault(
            "engine.name",
            f"{checks.value('engine.name')} while engine.deepspeed is given"
            f"{checks.values.where(('engine', 'deepspeed'))}; remove one of them (engine.deepspeed = null)",
            "engine.deepspeed",
        )
    if engine.name == "deepspeed" and engine.deepspeed is None:
        checks.fault(
            "engine.deepspeed",
            'missing; engine.name deepspeed needs it, e.g. {"zero_optimization": {"stage": 2}}',
            "engine.name",
        )
    if engine.by_stage is not None:
        for found in stage_faults(engine.deepspeed, engine.by_stage, checks.config.stages):
            checks.fault(found.key, found.message, "engine.by_stage", "engine.deepspeed", "schedule.stages", "train.epochs")
    if precision == "bf16_params" and engine.deepspeed is None:
        checks.fault(
            "train.precision",
            f"{checks.value('train.precision')} needs engine.deepspeed, which keeps the fp32 masters; else use bf16",
            "engine.deepspeed",
        )
    if checks.config.train.compile != "off" and _zero(engine.deepspeed).get("stage") == 3:
        checks.fault(
            "train.compile",
            f"{checks.value('train.compile')} under ZeRO-3{checks.values.where(('engine', 'deepspeed'))}, which gathers "
            f"parameters in hooks that a compiled block does not come by; set it to off, or take ZeRO 1 or 2",
            "engine.deepspeed",
        )
    if checks.config.train.compile != "off" and checks.config.train.gradient_checkpointing:
        checks.fault(
            "train.compile",
            f"{checks.value('train.compile')} beside {checks.got('train.gradient_checkpointing')}: torch compiles nothing "
            f"that is run twice with dropout in it; switch one of them off",
            "train.gradient_checkpointing",
        )
    if checks.config.model.attention.startswith("flash") and precision == "fp32":
        checks.fault(
            "model.attention",
            f"{checks.value('model.attention')} computes in 16 bits alone, beside {checks.got('train.precision')}; take bf16, or "
            f"attention sdpa",
            "train.precision",
        )
    origin = checks.values.origins.get(("train", "precision"))
    if precision in checks.values.off and getattr(origin, "kind", "") != "set":
        checks.fault(
            "train.precision",
            f"{checks.value('train.precision')} is switched off by {checks.values.off[precision]}; keep one",
        )


def _cache(checks: _Checks) -> None:
    cache, schedule = checks.config.cache, checks.config.schedule
    if cache.storage == "off":
        for key in filter(checks.given, ("cache.dtype", "cache.budget_gigabytes", "cache.path")):
            checks.fault(key, f"{checks.value(key)} is not used with {checks.got('cache.storage')}; remove it", "cache.storage")
        return
    if schedule.frozen_mode == "train":
        checks.fault(
            "schedule.frozen_mode",
            f"{checks.value('schedule.frozen_mode')} beside {checks.got('cache.storage')}: with dropout the frozen blocks give "
            f"something else each time; take eval, or switch the cache off",
            "cache.storage",
        )
    if schedule.name == "growing":
        checks.fault(
            "cache.storage",
            f"{checks.value('cache.storage')} beside {checks.got('schedule.name')}, which trains blocks that were frozen before: "
            f"what was kept would be wrong; set it to off",
            "schedule.name",
        )
    if cache.path is not None and cache.storage not in ("auto", "disk"):
        checks.fault(
            "cache.path", f"{checks.value('cache.path')} is for disk, not {checks.got('cache.storage')}", "cache.storage"
        )


def _task(checks: _Checks) -> None:
    task, model = checks.config.task, checks.config.model
    # A name that is not built in may be misspelt, which is said elsewhere, or another package's, which is asked later.
    if model.name is None and task.name in (*GLUE_TASKS, *SQUAD_TASKS, *LANGUAGE_TASKS, "table"):
        checks.fault(
            "model.name",
            f"missing; {checks.got('task.name')} needs a model, e.g. the layer configs/models/bert-base.json or "
            f"--set model.name=google-bert/bert-base-uncased",
            "task.name",
        )
    if task.name == "table":
        _own_data(checks)
        _table(checks)
    elif task.name in LANGUAGE_TASKS:
        _own_data(checks)
        shared = OWN_DATA_OPTIONS + (("text_columns",) if task.name == "causal_lm" else ())
        _unused(checks, [option for option in TABLE_OPTIONS if option not in shared], "only task 'table' uses it")
        _language(checks)
    elif task.name in ("demo", *GLUE_TASKS, *SQUAD_TASKS):
        _unused(checks, TABLE_OPTIONS, "only task 'table' uses it")
        _sources(checks)
    if task.name in ("demo", "table", *GLUE_TASKS, *SQUAD_TASKS):
        _unused(checks, LANGUAGE_OPTIONS, f"only {' and '.join(LANGUAGE_TASKS)} use it")
    if task.name in SQUAD_TASKS:
        if task.doc_stride >= checks.config.train.max_length:
            checks.fault(
                "task.doc_stride",
                f"{checks.value('task.doc_stride')} must be below {checks.got('train.max_length')}, "
                f"or text between two windows is lost",
                "train.max_length",
            )
    elif task.name in ("demo", "table", *GLUE_TASKS, *LANGUAGE_TASKS):
        _unused(checks, SQUAD_OPTIONS, "only squad tasks use it")


def _unused(checks: _Checks, options: Sequence[str], why: str) -> None:
    """Options that the task of this name has no use for."""
    for option in options:
        if checks.given(f"task.{option}"):
            checks.fault(f"task.{option}", f"{why}, not {checks.got('task.name')}; remove it", "task.name")


def _language(checks: _Checks) -> None:
    """What fits together in a language-modelling task."""
    task = checks.config.task
    pairs = task.source_column is not None or task.target_column is not None
    for one, other in (("source_column", "target_column"), ("target_column", "source_column")):
        needed = pairs or task.name == "summarization"
        if needed and getattr(task, one) is None:
            why = checks.got(f"task.{other}") if pairs and getattr(task, other) is not None else checks.got("task.name")
            checks.fault(f"task.{one}", f"missing; {why} needs it: the name of a column", f"task.{other}", "task.name")
    if task.source_column is not None and task.source_column == task.target_column:
        checks.fault(
            "task.target_column", f"{checks.value('task.target_column')} is task.source_column too", "task.source_column"
        )
    if task.name == "causal_lm":
        if task.text_columns is not None and pairs:
            checks.fault("task.text_columns", "given beside task.source_column and task.target_column; keep one or the other")
        elif task.text_columns is not None and len(task.text_columns) > 1:
            checks.fault("task.text_columns", f"{checks.value('task.text_columns')}: causal_lm takes one column")
        for option in ("generate", "source_prefix", "max_target_length"):
            if not pairs and checks.given(f"task.{option}"):
                checks.fault(f"task.{option}", "is for prompts with completions; it needs task.source_column and target_column")
    if task.packing is not None and (pairs or task.name == "summarization"):
        checks.fault("task.packing", "is for whole texts: pairs of texts are a row each; remove it", "task.name")
    generates = task.generate is True or (task.generate is None and task.name == "summarization")
    for option in ("max_new_tokens", "num_beams"):
        if checks.given(f"task.{option}") and not generates:
            checks.fault(f"task.{option}", "is for written texts: it needs task.generate = true; remove it", "task.generate")
    longest = 128 if task.max_target_length is None else task.max_target_length
    if task.name == "causal_lm" and pairs and longest >= checks.config.train.max_length:
        checks.fault(
            "task.max_target_length",
            f"{longest if task.max_target_length is None else checks.value('task.max_target_length')} must be below "
            f"{checks.got('train.max_length')}, which a prompt shares with its completion",
            "train.max_length",
        )
    if checks.config.train.max_length < 2:
        checks.fault("train.max_length", f"{checks.value('train.max_length')}; a token and the next one are 2", "task.name")


def _sources(checks: _Checks) -> None:
    """Where a built-in task's data comes from."""
    task = checks.config.task
    given = [name for name in ("path", *SOURCES) if getattr(task, name) is not None]
    keys = [f"task.{name}" for name in given]
    if task.name == "demo":
        for key in keys:
            checks.fault(key, f"{checks.got('task.name')} makes its own data; name a task, or remove it", "task.name")
    elif task.hub is not None and len(given) > 1:
        others = " and ".join(key for key in keys if key != "task.hub")
        checks.fault("task.hub", f"{checks.value('task.hub')} names the data, and so does {others}; keep one", *keys)
    elif task.name in GLUE_TASKS and given and task.path is None and task.hub is None:
        checks.fault("task.path", f"missing; {keys[0]} names a file in that folder", *keys)


def _own_data(checks: _Checks) -> None:
    """Where the user's own data comes from."""
    task = checks.config.task
    # A training file is one below the path, where both are given.
    possible = ("hub", "train_file") if task.path is None else ("path", "hub")
    sources = [name for name in possible if getattr(task, name) is not None]
    others = ("task.path", "task.hub", "task.train_file")
    if not sources:
        checks.fault(
            "task.train_file",
            f"missing; task '{task.name}' needs your data: train_file, path (a folder) or hub (a data set)",
            *others,
        )
    elif len(sources) > 1:
        keys = " and ".join(dotted(("task", name)) for name in sources)
        checks.fault(f"task.{sources[1]}", f"{keys} both name the data; keep one", *others)
    if task.validation_file is not None and task.validation_fraction is not None:
        checks.fault(
            "task.validation_fraction",
            f"not used beside {checks.got('task.validation_file')}; remove one",
            "task.validation_file",
        )


def _table(checks: _Checks) -> None:
    task = checks.config.task
    if task.labels is not None:
        if task.problem_type == "regression":
            checks.fault("task.labels", "names of classes for a regression (task.problem_type); remove one", "task.problem_type")
        if len(set(task.labels)) < len(task.labels):
            checks.fault("task.labels", f"{checks.value('task.labels')} names a class twice")
    if task.text_columns is not None:
        if len(set(task.text_columns)) < len(task.text_columns):
            checks.fault("task.text_columns", f"{checks.value('task.text_columns')} names a column twice")
        if task.label_column in task.text_columns:
            checks.fault(
                "task.label_column",
                f"{checks.value('task.label_column')} is one of task.text_columns",
                "task.text_columns",
            )


def _trackers(checks: _Checks) -> None:
    trackers = checks.config.trackers
    if len(set(trackers.names)) < len(trackers.names):
        checks.fault("trackers.names", f"{checks.value('trackers.names')} names a tracker twice")
    for name in sorted(set(trackers.options) - set(trackers.names)):
        checks.fault(
            "trackers.options",
            f"'{name}' is none of trackers.names ({', '.join(trackers.names) or 'empty'}); remove it, or name the tracker",
            "trackers.names",
        )
