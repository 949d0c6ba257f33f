"""What this machine and a config will do, before a run is started: no process group, no weights, nothing left on disk."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from progscale import __version__
from progscale.checks import Check, Status, size, told
from progscale.config import Config, micro_batch_size
from progscale.errors import UserError
from progscale.launcher import Ranks, read_ranks
from progscale.memory import file_system, machine_memory, read
from progscale.network import infiniband, interface_checks, interfaces, network_checks, setting_checks, signal_check

if TYPE_CHECKING:
    from rich.console import RenderableType

# Each has a line of its own; of the other requirements only those that are not met have one.
SHOWN = ("python", "torch", "accelerate", "deepspeed", "transformers", "datasets", "safetensors")
FILE_SYSTEMS = {"tmpfs": "lost at reboot", "overlay": "lost with its container"}
FILE_SYSTEMS |= dict.fromkeys(("nfs", "nfs4", "lustre", "cifs", "ceph", "beegfs", "gpfs"), "a save goes over the network")


class Gpu(NamedTuple):
    """A GPU that torch sees; sizes in bytes, `major` and `minor` are its compute capability."""

    name: str
    total: int
    free: int
    major: int
    minor: int


class Elements(NamedTuple):
    """Elements of a model.

    Attributes:
        total: of all its parameters.
        live: the most that a stage trains.
        four_bit: quantised to four bits; their scales, 3 % of that and more, are not counted.
    """

    total: int = 0
    live: int = 0
    four_bit: int = 0


def examine(config: Config, *, trust_remote_code: bool = False) -> list[Check]:
    """All checks of this machine for a config, in order. Reads the data, as a dry run does."""
    try:
        needed = [f"python{metadata('progscale')['Requires-Python'] or ''}", *(requires("progscale") or [])]
    except PackageNotFoundError:  # a checkout that nobody installed
        needed = []
    checks = version_checks(needed, sys.version.split()[0])
    try:
        import torch
        from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE

        from progscale.inputs import Permissions
        from progscale.tasks.cache import cache_dir

        import_module("progscale.setup")  # and with it all that a run imports
    except (ImportError, OSError) as error:
        return [*checks, Check("versions: imports", "problem", f"{error}; nothing more can be told", "pip install -e .")]
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        free = 0
        with contextlib.suppress(RuntimeError):  # nobody else comes onto a GPU that is full, or another's alone
            free = torch.cuda.mem_get_info(index)[0]
        gpus.append(Gpu(gpu.name, gpu.total_memory, free, gpu.major, gpu.minor))
    memory = machine_memory()
    checks += machine_checks(config, read("/proc/cpuinfo"), memory, disk_bytes("/dev/shm")[0])
    checks += gpu_checks(config, gpus, torch.version.cuda, os.path.exists("/proc/driver/nvidia/version"))
    check, ranks = ranks_of(os.environ, len(gpus), config.engine.name)
    checks += [check, *run_checks(config, ranks, on_gpu=bool(gpus))]
    check, elements = model_check(config, Permissions(trust_remote_code=trust_remote_code))
    checks += [check, *(memory_checks(config, elements, ranks, gpus, memory[1]) if elements.total else [])]
    checks += offload_checks(config, elements, ranks)
    folder, limit = existing(config.run.output_dir), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    checks += disk_checks(config, elements, folder, disk_bytes(folder)[1], read("/proc/mounts"), limit)
    checks += [*network_checks(os.environ, ranks), *interface_checks(os.environ, ranks, interfaces(), on_gpu=bool(gpus))]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shared = disk_bytes("/dev/shm")[0]
    checks += setting_checks(os.environ, ranks, infiniband(), on_gpu=bool(gpus), locked=locked, shared_memory=shared)
    checks.append(signal_check(os.environ, ranks))
    for what, where in (("PROGSCALE_CACHE", cache_dir()), ("HF_HOME", HF_HOME)):
        # Without it a run warns and goes on.
        checks.append(writable(f"cache: {what}", existing(where), f"set {what} to a folder of yours", "note"))
    found = "set: what is not in the cache is not fetched" if HF_HUB_OFFLINE else "not set"
    return [*checks, Check("cache: HF_HUB_OFFLINE", "note" if HF_HUB_OFFLINE else "ok", found)]


def version_checks(needed: Sequence[str], python: str, find: Callable[[str], str] = version) -> list[Check]:
    """Versions against requirements ("torch>=2.10"); `find` gives a package's, or raises PackageNotFoundError."""
    from packaging.requirements import Requirement

    own = __version__ if needed else f"{__version__}, not installed: what it needs is not known"
    checks = [Check("versions: progscale", "ok" if needed else "note", own, "" if needed else "pip install -e .")]
    for requirement in map(Requirement, needed):
        name = requirement.name
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = python if name == "python" else find(name)
            fits = requirement.specifier.contains(found, prereleases=True)
        except PackageNotFoundError:
            found, fits = "missing", False
        if not fits:
            remedy = "start it with another python" if name == "python" else f"pip install '{requirement}'"
            checks.append(Check(f"versions: {name}", "problem", f"{found}; needed: {requirement.specifier or 'any'}", remedy))
        elif name in SHOWN:
            checks.append(Check(f"versions: {name}", "ok", found))
    return checks


def machine_checks(config: Config, cpuinfo: str, memory: tuple[int, int], shared_memory: int) -> list[Check]:
    """Cores and what they have for bf16, memory (in all and available) and shared memory in bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bf16 = ", ".join(sorted({"amx_bf16", "avx512_bf16", "bf16"} & set(cpuinfo.split()))) or "nothing"
    small = shared_memory < 2**30 and config.train.num_workers > 0
    remedy = "data loader processes hand batches over there: train.num_workers=0, or docker run --shm-size=2g" if small else ""
    return [
        Check("machine: CPU", "ok", f"{cores} cores for this process; for bf16 they have {bf16}"),
        Check("machine: memory", "ok", f"{size(memory[1])} of {size(memory[0])} available"),
        Check("machine: /dev/shm", "note" if small else "ok", size(shared_memory), remedy),
    ]


def gpu_checks(config: Config, gpus: Sequence[Gpu], cuda: str | None, has_driver: bool) -> list[Check]:
    """The GPUs, with a note on one that emulates bf16, or where torch sees none and NVIDIA's driver is there."""
    checks, build = [], f"torch is built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
    for index, gpu in enumerate(gpus):
        bf16 = gpu.major >= 8 or cuda is None
        can = f"compute capability {gpu.major}.{gpu.minor}, {'' if bf16 else 'no '}bf16"
        found = f"{gpu.name}, {size(gpu.free)} of {size(gpu.total)} free; {can}; {build}"
        remedy = "bf16 is slow there: train.precision=fp16" if not bf16 and config.train.precision.startswith("bf16") else ""
        checks.append(Check(f"machine: GPU {index}", "note" if remedy else "ok", found, remedy))
    remedy = "NVIDIA's driver is here: see CUDA_VISIBLE_DEVICES, or install a CUDA build of torch" if has_driver else ""
    return checks or [Check("machine: GPU", "note" if has_driver else "ok", f"none: runs on the CPU; {build}", remedy)]


def ranks_of(environment: Mapping[str, str], gpus: int, engine: str) -> tuple[Check, Ranks]:
    """The processes that the launcher's variables tell of; else those that would be started, one on each GPU."""
    name = "ranks: processes"
    try:
        ranks = read_ranks(environment)
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        return Check(name, "problem", found, remedy), Ranks()
    if ranks.rank is None:
        count = 1 if engine == "plain" else max(1, gpus)
        found = f"{count}, one on each GPU, by accelerate launch; 1 by progscale train" if count > 1 else "1; no launcher here"
        return Check(name, "ok", found), Ranks(count, count)
    found = f"{ranks.world_size}, of which {ranks.local} on this machine"
    if ranks.local > gpus > 0:
        return Check(name, "problem", f"{found}; GPUs here: {gpus}", "start one on each GPU"), ranks
    return Check(name, "ok", found), ranks


def run_checks(config: Config, ranks: Ranks, *, on_gpu: bool) -> list[Check]:
    """What a run refuses once its ranks are known: batch, engine, precision, DeepSpeed's release and compiler."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    from progscale.compiling import check_backend
    from progscale.engine.deepspeed import check_release
    from progscale.engine.launch import check_precision, find_compiler
    from progscale.estimate import zero
    from progscale.joining import check_engine
    from progscale.setup import optimizer_of

    train, count, (stage, offloaded, _) = config.train, ranks.world_size, zero(config)
    name = f"zero{stage}{'-offload' if offloaded else ''}" if stage else "ddp" if count > 1 else "plain"
    backend = "no process group" if name == "plain" else "nccl" if on_gpu else "gloo"
    rows = f"{train.global_batch_size} a step, {train.global_batch_size // count} of each rank, at most {{}} at once"
    device = torch.device("cuda" if on_gpu else "cpu")
    checks = [told("ranks: rows", rows, micro_batch_size, config, count)]
    checks.append(told("ranks: engine", f"{name}, {backend}", check_engine, config, count))
    checks.append(told("ranks: precision", train.precision, check_precision, train.precision, device, stage > 0))
    if train.compile != "off":
        checks.append(told("ranks: torch.compile", train.compile, check_backend, train.compile, device))
    # AdamW needs nothing that a line could be about.
    if config.optimizer.name != "adamw":

        def optimizer() -> str:
            return optimizer_of(config).check(device) or config.optimizer.name

        checks.append(told("ranks: optimizer", "{}", optimizer))
    if stage:

        def release() -> None:
            check_release(version("deepspeed"), stage, on_cpu=not on_gpu, checkpointing=train.gradient_checkpointing)

        checks.append(told("ranks: DeepSpeed", f"its release is right for ZeRO-{stage}", release))
    if stage and not on_gpu:
        compiled = any(Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())).rglob("deepspeed_shm_comm.so"))
        found = "its collectives are compiled" if compiled else "the first run compiles its collectives, 25 to 90 s"
        checks.append(told("ranks: DeepSpeed on a CPU", found, find_compiler))
    return checks


def model_check(config: Config, permissions: Any) -> tuple[Check, Elements]:
    """Model, task and tokenizer as a run finds them, without weights."""
    from progscale.inputs import find_inputs
    from progscale.setup import method_of, nominal_plan, partition_of

    found = [Elements()]

    def look() -> str:
        inputs = find_inputs(config, permissions)
        method = method_of(config, inputs)
        plan = nominal_plan(config, inputs.family, partition_of(inputs, method), method)
        counts = [stage.trainable_parameters for stage in plan.stages]
        found[0] = Elements(plan.total_parameters, max(counts), plan.four_bit_parameters)
        model = "demo encoder" if config.model.name is None else inputs.request.name
        live = ", ".join(f"{count / 1e6:.2f}" for count in counts[:8]) + (" …" if counts[8:] else "")
        return f"{model} on {config.task.name}: {found[0].total / 1e6:.2f} M parameters, live by stage {live} M"

    return told("model: inputs", "{}", look), found[0]


def state_of(config: Config, elements: Elements, world_size: int) -> tuple[int, int]:
    """Bytes of weights, gradients and the optimizer's state on one rank: where it computes, and in CPU memory by offload."""
    from progscale.estimate import rank_state

    found = rank_state(config, elements.total, elements.live, elements.four_bit, world_size, moment_bytes(config))
    return found.device, found.host


def moment_bytes(config: Config) -> float:
    """Bytes that the optimizer keeps for an element, without the weights."""
    from progscale.setup import optimizer_of

    return optimizer_of(config).state_bytes_per_element


def memory_checks(config: Config, elements: Elements, ranks: Ranks, gpus: Sequence[Gpu], available: int) -> list[Check]:
    """What `state_of` needs, against the GPU with least free memory, and for all local ranks the CPU's `available` bytes."""
    device, host = state_of(config, elements, ranks.world_size)
    rows = [("a GPU", device, min(gpu.free for gpu in gpus))] if gpus else []
    rows += [("the CPU", ranks.local * (host if gpus else device + host), available)] if available and (host or not gpus) else []
    checks = []
    for what, need, there in rows:
        what_for = "for weights, gradients and the optimizer's state"
        found = f"{size(need)} {what_for}, of {size(there)} available; activations are not counted"
        remedy = "" if need <= there else "a higher ZeRO stage, offload, bf16_params, or more machines"
        checks.append(Check(f"memory: {what}", "problem" if remedy else "ok", found, remedy))
    return checks


def offload_checks(config: Config, elements: Elements, ranks: Ranks) -> list[Check]:
    """Whether this machine's ranks can put their partitions where the config offloads the parameters to."""
    from progscale.config.deepspeed import nvme_folder
    from progscale.engine.mapped import check_folder
    from progscale.estimate import partition_bytes

    folder = nvme_folder(config.engine.deepspeed)
    if folder is None:
        return []
    needed = ranks.local * partition_bytes(config, elements.total, ranks.world_size)
    return [told("memory: parameters on disk", "{}", check_folder, folder, needed)]


def disk_checks(config: Config, elements: Elements, folder: Path, free: int, mounts: str, file_limit: int) -> list[Check]:
    """Where the runs' folder is or will be: can it be written, its file system, room for checkpoints, the limit of one file.

    `elements` of the model (none: not known); `free` bytes in the existing `folder`; the content of /proc/mounts; RLIMIT_FSIZE in
    bytes, negative for none.
    """
    from progscale.estimate import zero

    keep, shard = config.checkpoint.keep, config.checkpoint.shard_megabytes * 2**20
    checks = [writable("checkpoints: folder", folder, "choose another with --set run.output_dir=…")]
    kind = file_system(folder, mounts)
    why = FILE_SYSTEMS.get(kind, "")
    checks.append(Check("checkpoints: file system", "note" if why else "ok", kind, why))
    if elements.total:
        # fp32 weights and the moments of what is live; the new one is written before the oldest goes.
        frozen = (2 if zero(config)[2] else 4) * (elements.total - elements.live - elements.four_bit) + elements.four_bit // 2
        one = math.ceil((4 + moment_bytes(config)) * elements.live) + frozen
        need, shard = (keep + 1) * one, min(shard, one)
        found = f"{size(one)} each, {keep} kept while one is written: {size(need)} of {size(free)} free"
        remedy = "" if need <= free else "make room, --set run.output_dir=…, or a smaller checkpoint.keep"
        checks.append(Check("checkpoints: room", "problem" if remedy else "ok", found, remedy))
    found = "not limited" if file_limit < 0 else f"limited to {size(file_limit)}, and a checkpoint's are up to {size(shard)}"
    remedy = "ulimit -f unlimited, or a smaller checkpoint.shard_megabytes" if 0 <= file_limit < shard else ""
    return [*checks, Check("checkpoints: size of a file", "problem" if remedy else "ok", found, remedy)]


def writable(name: str, folder: Path, remedy: str, status: Status = "problem") -> Check:
    """Whether a file can be made in a folder; it gets no name, so that not even a kill leaves it behind."""

    def make() -> str:
        with tempfile.TemporaryFile(dir=folder):
            return "writable"

    return told(name, f"{folder} is {{}}", make, remedy=remedy, status=status)


def existing(path: str | Path) -> Path:
    """A path, or the nearest above it that exists; without links."""
    place = Path(path).absolute()
    while not os.path.exists(place):
        place = place.parent
    return place.resolve()


def disk_bytes(folder: str | Path) -> tuple[int, int]:
    """Bytes of a file system in all, and free for this user; 0 where there is none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0, 0
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def render_checks(checks: Sequence[Check]) -> RenderableType:
    """The checks as a table for the terminal; what to do stands below what was found."""
    from rich.table import Table
    from rich.text import Text

    problems = sum(check.status == "problem" for check in checks)
    table = Table(caption=Text(f"{problems or 'no'} problem{'' if problems == 1 else 's'}"), caption_justify="left")
    for heading in ("check", "status", "found"):
        table.add_column(heading)
    for check, after in zip(checks, [*checks[1:], Check("", "ok", "")], strict=True):
        cell = check.found + (f"\n→ {check.remedy}" if check.remedy else "")
        style = {"ok": "", "note": "yellow", "problem": "bold red"}[check.status]
        end = after.name.split(":")[0] != check.name.split(":")[0]
        table.add_row(Text(check.name), Text(check.status, style), Text(cell), end_section=end)
    return table
