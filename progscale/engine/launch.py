"""The process's environment and the engine of a run: ranks, backend, threads, Accelerate."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from progscale.engine import ranks
from progscale.engine.base import Engine, EngineSettings
from progscale.engine.local import LocalEngine
from progscale.engine.mapped import as_deepspeed_reads_it
from progscale.errors import UserError
from progscale.launcher import interface_towards, keeps_store, read_ranks, try_port

# Building DeepSpeed's collectives takes one or two.
STALE_BUILD_MINUTES = 15


def set_up_cpu(threads: int | None = None) -> int:
    """Thread count and denormal handling of this process; to be called before any tensor work.

    The threads of torch's pool inherit the flush-to-zero mode of the thread that starts them, hence the order.

    Args:
        threads: for this rank; None shares the machine's cores among its local ranks.

    Returns:
        The number of threads set.

    Raises:
        UserError: the launcher's variables do not fit together.
    """
    torch.set_flush_denormal(True)
    local_ranks = read_ranks(os.environ).local
    # macOS does not tell which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = threads or max(1, cores // local_ranks)
    torch.set_num_threads(count)
    return count


def make_accelerator(*, deepspeed: Mapping[str, Any] | None, timeout_seconds: int = 600) -> Any:
    """Accelerate's handle on the process group; made once, before the engine.

    Mixed precision stays with the engine: Accelerate would wrap the model's forward once more at each stage.

    Args:
        deepspeed: the literal DeepSpeed JSON of the run, or None for one process or DDP.
        timeout_seconds: of collectives.

    Raises:
        UserError: the launcher was told of DeepSpeed, FSDP or another kind of parallelism that the run's config has not, or
            rank 0 cannot have the port.
    """
    if keeps_store(os.environ) and not ranks.is_distributed():
        port = int(os.environ["MASTER_PORT"])
        try:
            try_port(port)
        except OSError as error:
            raise UserError(f"MASTER_PORT: {port} cannot be opened ({error.strerror}); choose another") from error
    take_over_launcher_settings(deepspeed is not None)
    on_gpu = torch.cuda.is_available()
    if deepspeed is not None and not on_gpu:
        # Otherwise DeepSpeed looks for every accelerator it knows, and warns that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        find_compiler()
    if not on_gpu:
        choose_interface()
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    plugin = None
    if deepspeed is not None:
        set_single_process_environment()
        plugin = DeepSpeedPlugin(hf_ds_config=_accelerate_config(deepspeed), zero3_init_flag=False)
    process_group = InitProcessGroupKwargs(
        # Without the name Accelerate's state sees one process under DeepSpeed on a machine with no GPU; with it, a plain
        # run would wait for a process group that nobody starts.
        backend="gloo" if not on_gpu and "RANK" in os.environ else None,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    accelerator = Accelerator(
        mixed_precision="no", cpu=not on_gpu and plugin is None, deepspeed_plugin=plugin, kwargs_handlers=[process_group]
    )
    if plugin is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        # Accelerate tells transformers of ZeRO-3 whatever `zero3_init_flag` says, and transformers then partitions each
        # model as it is built, random weights included. Models are loaded and partitioned by ourselves.
        unset_hf_deepspeed_config()
    return accelerator


def choose_interface() -> None:
    """Has gloo meet the ranks of other machines on the network on which the head is reached.

    By itself gloo takes the address that this machine's own name has, on many machines (Debian, containers) that of the loopback,
    on which nobody else is. NCCL looks at the interfaces.

    Raises:
        UserError: no way leads to the head.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not read_ranks(os.environ).machines_are_several:
        return
    host = os.environ["MASTER_ADDR"]
    try:
        interface = interface_towards(host)
    except OSError as error:
        raise UserError(f"MASTER_ADDR: '{host}' cannot be reached from {socket.gethostname()} ({error.strerror})") from error
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def take_over_launcher_settings(deepspeed: bool) -> None:
    """Takes out of the environment what `accelerate launch` put there from its own config file and the run decides itself.

    Args:
        deepspeed: whether the run's config has a DeepSpeed JSON.

    Raises:
        UserError: the launcher's file asks for a kind of parallelism that this run would silently go without.
    """
    # The launcher alone sets this one; an earlier run in this process leaves ACCELERATE_USE_DEEPSPEED behind.
    if "ACCELERATE_CONFIG_DS_FIELDS" in os.environ and not deepspeed:
        raise UserError(
            "engine.deepspeed: missing, while accelerate's config file has distributed_type DEEPSPEED; the run's own config "
            "decides: add a layer such as --config configs/zero2.json or your DeepSpeed JSON, or launch with MULTI_GPU"
        )
    for name in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate's config file asks for {name}, which no stage switch supports here; launch with distributed_type "
                "MULTI_GPU and choose DDP or DeepSpeed ZeRO in the run's config (--config configs/zero3.json)"
            )
    precision = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and os.environ.get("RANK", "0") == "0":
        print(f"accelerate's mixed_precision '{precision}' is not used: train.precision decides", flush=True)
    # With these Accelerate refuses a plugin that is built here.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    if not deepspeed:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def check_precision(precision: str, device: torch.device, deepspeed: bool) -> None:
    """Refuses a precision that the device or the engine does not have.

    Raises:
        UserError: naming what can be chosen instead.
    """
    if precision == "bf16_params" and not deepspeed:
        raise UserError(
            "train.precision: 'bf16_params' keeps fp32 masters in DeepSpeed; without it take 'bf16' (autocast over fp32 weights)"
        )
    if precision == "fp16" and device.type == "cpu":
        from deepspeed.accelerator import get_accelerator

        if not deepspeed or not get_accelerator().is_fp16_supported():
            raise UserError("train.precision: 'fp16' is not supported on this CPU; take 'bf16' or 'fp32'")


def create_engine(
    module: torch.nn.Module,
    settings: EngineSettings,
    accelerator: Any,
    deepspeed: Mapping[str, Any] | None = None,
    of_stage: Callable[[int], Mapping[str, Any]] | None = None,
) -> Engine:
    """The engine that fits: DeepSpeed when its JSON is given, else DDP on several processes, else plain.

    Args:
        module: the model, as the method prepared it.
        settings: common to all engines.
        accelerator: from `make_accelerator`.
        deepspeed: the literal DeepSpeed JSON.
        of_stage: the same for each stage, where it differs.
    """
    if deepspeed is not None:
        from progscale.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, settings, accelerator, deepspeed, of_stage)
    return LocalEngine(module, settings, accelerator)


def set_single_process_environment() -> None:
    """Rank variables for a process that no launcher gave any: DeepSpeed needs them even when it is alone."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def find_compiler() -> None:
    """On a machine with no GPU, DeepSpeed compiles its shared-memory collectives at the first run (25 to 90 s).

    Raises:
        UserError: a C++ compiler or ninja is missing, or a build that was killed would be waited for without end.
    """
    # ninja comes with DeepSpeed, into the environment's own bin, which is on no PATH unless somebody activated it.
    own_bin = str(Path(sys.executable).parent)
    if own_bin not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = own_bin + os.pathsep + os.environ.get("PATH", "")
    missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"engine.deepspeed: DeepSpeed on a CPU compiles its collectives at the first run and needs "
            f"{' and '.join(missing)}; install a C++ compiler and ninja (Debian: apt-get install g++ ninja-build), "
            f"or run without DeepSpeed (configs/ddp.json)"
        )
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    for lock in root.rglob("deepspeed_shm_comm/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > STALE_BUILD_MINUTES:
            raise UserError(
                f"engine.deepspeed: a build was killed {minutes:.0f} min ago, and its lock would be waited for; rm {lock}"
            )
    if os.environ.get("RANK", "0") == "0" and not list(root.rglob("deepspeed_shm_comm.so")):
        print("DeepSpeed compiles its CPU collectives, once on this machine: 25 to 90 s …", flush=True)


def _accelerate_config(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """A config that satisfies Accelerate's own start; every stage writes its real one."""
    return {**as_deepspeed_reads_it(deepspeed), "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
