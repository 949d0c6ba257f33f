"""A DeepSpeed JSON inside a config: what belongs to our sections is moved there, the rest is checked and kept.

Accelerate refuses an `optimizer` in a DeepSpeed config, a `scheduler` would start again at each stage, and batch sizes
are written anew for each stage; so these, precision and clipping are translated. What the file leaves out or calls
"auto" comes from our sections, not from DeepSpeed's defaults; in particular warm-up is linear unless the file
asks for "log", which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from progscale.config import deepspeed_keys as keys
from progscale.config.read import KeyPath, dotted, show
from progscale.errors import ConfigError, Fault, nearest

PREFIX = ("engine", "deepspeed")
Where = Callable[[KeyPath], str]

# DeepSpeed's Adam is AdamW too. It has no optimizer with state in 8 bits.
_OPTIMIZERS = {"Adam": "adamw", "AdamW": "adamw", "Lion": "lion"}
_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay")
_CURVES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_PRECISIONS = {"fp16": "fp16", "bf16": "bf16_params", "bfloat16": "bf16_params"}


@dataclass
class Translation:
    """One layer's DeepSpeed block, taken apart.

    Attributes:
        values: what goes to our sections: path → (value, the DeepSpeed key it comes from).
        off: precisions the block switches off by name: precision → the DeepSpeed key.
        rest: what stays for DeepSpeed.
        faults: what cannot be translated.
    """

    values: dict[KeyPath, tuple[Any, str]] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def translate(block: Mapping[str, Any], source: str, prefix: str = "engine.deepspeed.") -> Translation:
    """Takes a DeepSpeed block apart.

    Args:
        block: the JSON; partial ones are fine, since layers are merged.
        source: of the layer, for messages.
        prefix: what stands before a key in the user's file: "" for a bare DeepSpeed JSON.
    """
    found = Translation(rest={key: value for key, value in block.items() if key not in keys.TRANSLATED_KEYS})
    reader = _Reader(found, source, prefix)
    for key, path in keys.BATCH_KEYS.items():
        if key in block:
            reader.take(path, block[key], key)
    if "gradient_clipping" in block:
        clip = block["gradient_clipping"]
        # 0 is DeepSpeed's "never clip".
        is_zero = isinstance(clip, int | float) and not isinstance(clip, bool) and clip == 0
        reader.take(("train", "max_grad_norm"), None if is_zero else clip, "gradient_clipping")
    for key in _PRECISIONS:
        if key in block:
            reader.precision(key, block[key])
    if "optimizer" in block:
        reader.optimizer(block["optimizer"])
    if "scheduler" in block:
        reader.scheduler(block["scheduler"])
    return found


@dataclass
class _Reader:
    found: Translation
    source: str
    prefix: str

    def fault(self, key: str, message: str) -> None:
        self.found.faults.append(Fault(self.prefix + key, message))

    def take(self, path: KeyPath, value: Any, key: str) -> None:
        """Notes a value for one of our options, unless it is "auto" or contradicts an earlier one of the block."""
        if value == "auto":
            return
        before = self.found.values.get(path)
        if before is not None and before[0] != value:
            self.fault(key, f"{show(value)} contradicts {before[1]}, {show(before[0])} (both in {self.source}); keep one")
            return
        self.found.values[path] = (value, self.prefix + key)

    def object(self, key: str, value: Any) -> Mapping[str, Any]:
        """The value if it is an object; else a fault, and an empty object to go on with."""
        if isinstance(value, Mapping):
            return value
        self.fault(key, f"{show(value)} (from {self.source}) must be an object")
        return {}

    def precision(self, key: str, value: Any) -> None:
        block = self.object(key, value)
        enabled = block.get("enabled", "auto")
        allowed = keys.FP16_KEYS if key == "fp16" else frozenset({"enabled"})
        for name in block:
            if name not in allowed:
                self.fault(
                    f"{key}.{name}",
                    f"not supported (in {self.source}): the masters are always fp32, and every gradient is checked; for fp32 "
                    f"gradients at stage 2 or 3 set data_types.grad_accum_dtype"
                    if key != "fp16"
                    else f"unknown key (from {self.source}){nearest(name, allowed)}",
                )
        if key == "fp16":
            scale = {name: inner for name, inner in block.items() if name != "enabled" and name in allowed}
            if scale:
                self.found.rest["fp16"] = scale
        if enabled is True:
            self.take(("train", "precision"), _PRECISIONS[key], f"{key}.enabled")
        elif enabled is False:
            self.found.off[_PRECISIONS[key]] = f"{self.prefix}{key}.enabled"
        elif enabled != "auto":
            self.fault(f"{key}.enabled", f'{show(enabled)} (from {self.source}) must be true, false or "auto"')

    def optimizer(self, value: Any) -> None:
        block = self.object("optimizer", value)
        kind = block.get("type", "AdamW")
        name = {known.lower(): ours for known, ours in _OPTIMIZERS.items()}.get(kind.lower() if isinstance(kind, str) else "")
        if name is None:
            self.fault(
                "optimizer.type",
                f"{show(kind)} (from {self.source}) is not supported; allowed: Adam and AdamW, which both mean AdamW, as in "
                f"DeepSpeed, and Lion; others, optimizer.name has",
            )
        elif "type" in block:
            self.take(("optimizer", "name"), name, "optimizer.type")
        self._only("optimizer", block, ("type", "params"))
        params = self.object("optimizer.params", block.get("params", {}))
        self._only("optimizer.params", params, [key for key in _OPTIMIZER_PARAMS if key != "eps" or name != "lion"])
        for name in _OPTIMIZER_PARAMS:
            if name in params:
                self.take(("optimizer", name), params[name], f"optimizer.params.{name}")

    def scheduler(self, value: Any) -> None:
        block = self.object("scheduler", value)
        kind = block.get("type")
        self._only("scheduler", block, ("type", "params"))
        if kind is not None:
            if not isinstance(kind, str) or kind not in _CURVES:
                hint = nearest(kind, _CURVES) if isinstance(kind, str) else ""
                self.fault(
                    "scheduler.type",
                    f"{show(kind)} (from {self.source}) is not supported; allowed: {', '.join(_CURVES)}{hint}",
                )
                return
            self.take(("optimizer", "lr_schedule"), _CURVES[kind], "scheduler.type")
        params = self.object("scheduler.params", block.get("params", {}))
        names = ["warmup_num_steps", "warmup_type"]
        names += ["warmup_min_ratio", "cos_min_ratio"] if kind == "WarmupCosineLR" else ["warmup_min_lr"]
        names += ["warmup_max_lr"] if kind != "WarmupCosineLR" else []
        names += ["total_num_steps"] if kind != "WarmupLR" else []
        self._only("scheduler.params", params, names)
        self._fixed(params, "warmup_type", "linear", "the warm-up is linear")
        self._fixed(params, "warmup_min_lr", 0, "the warm-up starts at 0")
        self._fixed(params, "warmup_min_ratio", 0, "the warm-up starts at 0")
        self._fixed(params, "total_num_steps", "auto", "the curve ends with the run, whose length train.max_steps sets")
        for name, option in (
            ("warmup_max_lr", "lr"),
            ("warmup_num_steps", "warmup_steps"),
            ("cos_min_ratio", "final_lr_fraction"),
        ):
            if name in params and name in names:
                self.take(("optimizer", option), params[name], f"scheduler.params.{name}")

    def _fixed(self, params: Mapping[str, Any], name: str, value: Any, why: str) -> None:
        if name in params and params[name] not in (value, "auto"):
            self.fault(
                f"scheduler.params.{name}",
                f"{show(params[name])} (from {self.source}) is not supported: {why}; use {show(value)} or remove it",
            )

    def _only(self, key: str, block: Mapping[str, Any], allowed: Iterable[str]) -> None:
        for name in block:
            if name not in allowed:
                self.fault(
                    f"{key}.{name}",
                    f"not supported (in {self.source}); allowed: {', '.join(allowed)}{nearest(name, allowed)}",
                )


def second_copies(zero: Mapping[str, Any]) -> int:
    """Ranks that share a second copy of the parameters (ZeRO++'s hierarchical partitioning); 1 where there is none.

    Args:
        zero: the section `zero_optimization`.
    """
    return int(zero.get("zero_hpz_partition_size", 1))


def check_groups(deepspeed: Mapping[str, Any] | None, world_size: int) -> None:
    """Refuses groups for second copies of the parameters that do not divide the ranks.

    Args:
        deepspeed: literal keys.
        world_size: ranks.

    Raises:
        ConfigError: naming the sizes that do.
    """
    size = second_copies((deepspeed or {}).get("zero_optimization", {}))
    if world_size % size:
        allowed = ", ".join(str(number) for number in range(1, world_size + 1) if world_size % number == 0)
        key = "engine.deepspeed.zero_optimization.zero_hpz_partition_size"
        raise ConfigError(
            Fault(
                key, f"{size} ranks in a group do not divide the {world_size} of this run; allowed: {allowed} (those of a node)"
            )
        )


def nvme_folder(deepspeed: Mapping[str, Any] | None) -> Path | None:
    """Where a DeepSpeed JSON wants the files of offloaded parameters; None where it wants none.

    Args:
        deepspeed: literal keys.
    """
    block = ((deepspeed or {}).get("zero_optimization") or {}).get("offload_param") or {}
    return Path(block["nvme_path"]).expanduser() if block.get("device") == "nvme" else None


def check_rest(rest: Mapping[str, Any], where: Where) -> list[Fault]:
    """Faults of what is left for DeepSpeed, after all layers are merged.

    Args:
        rest: the literal part, without the translated keys.
        where: gives " (from …)" for a path below `engine.deepspeed`.
    """
    faults: list[Fault] = []

    def fault(path: KeyPath, message: str) -> None:
        faults.append(Fault(dotted((*PREFIX, *path)), message))

    for key in rest:
        if key in keys.REFUSED_KEYS:
            fault((key,), f"not supported{where((key,))}: {keys.REFUSED_KEYS[key]}")
        elif key not in keys.TOP_LEVEL_KEYS:
            hint = nearest(key, keys.LITERAL_KEYS | keys.TRANSLATED_KEYS)
            fault((key,), f"is not a key of DeepSpeed{where((key,))}{hint}")
    _check_zero(rest, where, fault)
    _check_others(rest, where, fault)
    reported = {found.key for found in faults}
    for path in _autos(rest, ()):
        refused = path[0] in keys.REFUSED_KEYS or path[0] not in keys.TOP_LEVEL_KEYS
        if path not in keys.AUTO_PATHS and not refused and dotted((*PREFIX, *path)) not in reported:
            fault(path, f'"auto"{where(path)} is not filled by anything; give a value or remove the key')
    return faults


def _autos(value: Any, path: KeyPath) -> list[KeyPath]:
    if value == "auto":
        return [path]
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _autos(inner, (*path, key))]
    return []


def _check_zero(rest: Mapping[str, Any], where: Where, fault: Callable[[KeyPath, str], None]) -> None:
    root = ("zero_optimization",)
    no_zero = "without ZeRO every rank keeps a whole copy, which engine.name = ddp does"
    if "zero_optimization" not in rest:
        # A misspelt one has been reported with the right name.
        if not any("zero" in key and key not in keys.TOP_LEVEL_KEYS for key in rest):
            fault(root, f"missing; give a stage of 1, 2 or 3 ({no_zero})")
        return
    zero = rest["zero_optimization"]
    if not isinstance(zero, Mapping):
        fault(root, f'{show(zero)}{where(root)} must be an object, e.g. {{"stage": 2}}')
        return
    for key in zero:
        path = (*root, key)
        if key in keys.REFUSED_ZERO_KEYS:
            fault(path, f"not supported{where(path)}: {keys.REFUSED_ZERO_KEYS[key]}")
        elif key not in keys.ZERO_KEYS:
            fault(path, f"is not a key of DeepSpeed's ZeRO{where(path)}{nearest(key, keys.ZERO_KEYS)}")
        elif key in keys.ZERO_BOOLEANS and not isinstance(zero[key], bool) and zero[key] != "auto":
            fault(path, f"{show(zero[key])}{where(path)} must be true or false")
        elif key in keys.ZERO_NUMBERS and not _is_size(zero[key]) and zero[key] != "auto":
            fault(path, f"{show(zero[key])}{where(path)} must be a number of elements, 0 or more")
    stage = zero.get("stage", 0)
    path = (*root, "stage")
    if "stage" not in zero:
        fault(path, f"missing{where(root)}; 1, 2 or 3 ({no_zero})")
    elif isinstance(stage, bool) or not isinstance(stage, int) or stage not in (0, 1, 2, 3):
        fault(path, f"{show(stage)}{where(path)} must be 1, 2 or 3")
    elif stage == 0:
        fault(path, f"0{where(path)} must be 1, 2 or 3: {no_zero}")
    _check_second_copies(zero, stage, where, fault)
    for name, allowed in (
        ("offload_optimizer", keys.OFFLOAD_OPTIMIZER_KEYS),
        ("offload_param", keys.OFFLOAD_PARAM_KEYS),
    ):
        _check_offload(zero.get(name), (*root, name), allowed, stage, where, fault)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _check_second_copies(zero: Mapping[str, Any], stage: Any, where: Where, fault: Callable[[KeyPath, str], None]) -> None:
    path = ("zero_optimization", "zero_hpz_partition_size")
    size = zero.get(path[1], 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        if size != "auto":
            fault(
                path, f"{show(size)}{where(path)} must be a number of ranks, 1 or more, that divides all ranks: those of a node"
            )
    elif size > 1 and stage in (1, 2):
        fault(path, f"{size}{where(path)} needs ZeRO stage 3, not {stage}: only there are the parameters spread over the ranks")


def _check_offload(
    block: Any,
    path: KeyPath,
    allowed: frozenset[str],
    stage: Any,
    where: Where,
    fault: Callable[[KeyPath, str], None],
) -> None:
    if block is None:
        return
    if not isinstance(block, Mapping):
        fault(path, f'{show(block)}{where(path)} must be an object, e.g. {{"device": "cpu"}}')
        return
    for key in block:
        if key not in allowed:
            fault((*path, key), f"is not a key of DeepSpeed{where((*path, key))}{nearest(key, allowed)}")
    device, of_parameters = block.get("device", "none"), path[-1] == "offload_param"
    if device == "nvme" and not of_parameters:
        fault((*path, "device"), f'"nvme"{where((*path, "device"))} is not supported: {keys.NO_NVME_OPTIMIZER}; use "cpu"')
    elif device not in ("none", "cpu", "nvme"):
        allowed_devices = '"cpu", "nvme" or "none"' if of_parameters else '"cpu" or "none"'
        fault((*path, "device"), f"{show(device)}{where((*path, 'device'))} must be {allowed_devices}")
    elif of_parameters and device != "none" and stage in (1, 2):
        fault(path, f"needs ZeRO stage 3, not {stage}{where(path)}: only there are the parameters spread over the ranks")
    elif device == "nvme":
        folder = block.get("nvme_path")
        if not isinstance(folder, str) or not folder:
            given = f"{show(folder)}{where((*path, 'nvme_path'))}" if "nvme_path" in block else f"missing{where(path)}"
            fault((*path, "nvme_path"), f"{given}; must name a folder on a local disk of each machine")
        for key in keys.NOT_BESIDE_NVME:
            if key in block:
                fault((*path, key), f"{show(block[key])}{where((*path, key))} has no effect: {keys.NVME_IS_MAPPED}; remove it")


def _check_others(rest: Mapping[str, Any], where: Where, fault: Callable[[KeyPath, str], None]) -> None:
    path: KeyPath
    zero = rest.get("zero_optimization")
    types = rest.get("data_types")
    if isinstance(types, Mapping):
        for key in types:
            if key not in keys.DATA_TYPES_KEYS:
                path = ("data_types", key)
                fault(path, f"is not a key of DeepSpeed{where(path)}{nearest(key, keys.DATA_TYPES_KEYS)}")
        is_fp32 = types.get("grad_accum_dtype") in ("fp32", "float32", "float", "torch.float32")
        if is_fp32 and isinstance(zero, Mapping) and zero.get("stage") == 1:
            path = ("data_types", "grad_accum_dtype")
            fault(
                path,
                f"fp32 at ZeRO stage 1{where(path)} selects another optimizer class (BF16_Optimizer), whose state "
                f"no stage switch can carry; use stage 2, or remove it",
            )
    elif types is not None:
        fault(("data_types",), f"{show(types)}{where(('data_types',))} must be an object")
    for path, (only, why) in keys.FIXED.items():
        value: Any = rest
        for key in path:
            value = value.get(key, only) if isinstance(value, Mapping) else only
        if value not in (only, "auto"):
            fault(path, f"{show(value)}{where(path)} is not supported: {why}; remove it")
