"""Frozen partitions of ZeRO-3 in files on a local disk, mapped into memory: `offload_param: {"device": "nvme"}`.

DeepSpeed's own way (0.19.8) reads such files into buffers that may run out, knows no way back from memory to a file for what
freezes, and leaves an empty tensor where checkpoints, audit and the next engine look for the weights. A mapped file is an
ordinary tensor in CPU memory, which the kernel reads when it is used and lets go of when memory is short; so DeepSpeed is told
"cpu". What is live lies in memory anyway: the optimizer writes it in every step.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from progscale.checks import size
from progscale.config.deepspeed import nvme_folder
from progscale.errors import UserError
from progscale.memory import file_system, read

# Bytes from which a tensor is worth a file: a page is 4 KiB, and a process has 65,530 mappings.
SMALLEST = 64 * 1024
PAGE = 4096
# File systems.
IN_MEMORY = ("tmpfs", "ramfs")
KEY = "engine.deepspeed.zero_optimization.offload_param.nvme_path"


def as_deepspeed_reads_it(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a DeepSpeed JSON in which the parameters are offloaded to the CPU's memory instead of files."""
    config = copy.deepcopy(dict(deepspeed))
    if nvme_folder(config) is not None:
        block = config["zero_optimization"]["offload_param"]
        block["device"] = "cpu"
        del block["nvme_path"]
    return config


def to_file(held: torch.Tensor, folder: Path) -> None:
    """Moves a tensor's bytes into a file without a name, which is gone with the tensor, however the process ends.

    Nothing is done with what is small, on a GPU, or in a file already.

    Args:
        held: what a rank keeps of a parameter, contiguous.
        folder: on a local disk.

    Raises:
        UserError: the disk is full, or files in the folder cannot be written or mapped.
    """
    if held.device.type != "cpu" or held.nbytes < SMALLEST or is_mapped(held):
        return
    held.data = _in_file(held.detach().view(-1), folder).view(held.shape)


def to_files(held: Iterable[torch.Tensor], folder: Path) -> None:
    """`to_file` of each."""
    for tensor in held:
        to_file(tensor, folder)


def _in_file(flat: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy of a tensor in a file."""
    content = flat.view(torch.uint8).numpy().data
    try:
        number, name = tempfile.mkstemp(prefix="progscale-", suffix=".partition", dir=folder)
        # At once: a process may be killed while it writes, and nobody would clear up.
        os.unlink(name)
        with open(number, "wb", buffering=0) as file:
            left = content
            # Written and not mapped first: a full disk is then an error, and no signal that ends the process.
            while left:
                left = left[file.write(left) :]
            return torch.from_file(f"/dev/fd/{number}", shared=True, size=flat.numel(), dtype=flat.dtype)
    except (OSError, RuntimeError) as error:  # the latter from torch, where a file system maps no files
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{KEY}: {len(content)} bytes cannot be put into a file in '{folder}' ({reason})") from error


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def give_back_pinned() -> None:
    """Returns to the system what torch keeps of pinned memory that was freed: what lies in files now was pinned before."""
    if torch.cuda.is_available():
        # Torch 2.13 has a public name for it.
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty is not None:
            empty()


def check_folder(folder: Path, needed: int) -> str:
    """Looks whether partitions can be written to a folder.

    Args:
        folder: as `nvme_folder` gives it.
        needed: bytes that this machine's ranks will put there.

    Returns:
        What was found.

    Raises:
        UserError: it is no folder, lies in memory, files in it cannot be written or mapped, or it has too little room.
    """
    try:
        if not folder.is_dir():
            raise UserError(f"{KEY}: '{folder}' is not a folder; make one on a disk of this machine")
        about = os.statvfs(folder)
        kind = file_system(folder.resolve(), read("/proc/mounts"))
    except OSError as error:
        raise UserError(f"{KEY}: '{folder}' cannot be read ({error.strerror})") from error
    if kind in IN_MEMORY:
        raise UserError(f"{KEY}: '{folder}' is on a {kind}, which lies in memory itself; take a folder on a disk of this machine")
    _in_file(torch.zeros(PAGE, dtype=torch.uint8), folder)
    free = about.f_bavail * about.f_frsize
    found = f"{size(needed)} for partitions of the parameters, of {size(free)} free in {folder} ({kind})"
    if needed > free:
        raise UserError(f"{KEY}: {found}; take a folder on a larger disk, or more machines")
    return found
