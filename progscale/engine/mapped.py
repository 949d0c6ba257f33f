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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from progscale.config.deepspeed import nvme_folder
from progscale.errors import UserError

# Bytes from which a tensor is worth a file: a page is 4 KiB, and a process has 65,530 mappings.
SMALLEST = 64 * 1024
KEY = "engine.deepspeed.zero_optimization.offload_param.nvme_path"


def folder_of(deepspeed: Mapping[str, Any] | None) -> Path | None:
    """Where a DeepSpeed JSON wants the parameters' files; None where it wants none."""
    folder = nvme_folder(deepspeed)
    return None if folder is None else Path(folder).expanduser()


def as_deepspeed_reads_it(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a DeepSpeed JSON in which the parameters are offloaded to the CPU's memory instead of files."""
    config = copy.deepcopy(dict(deepspeed))
    if folder_of(config) is not None:
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
        UserError: the disk is full, or cannot be written.
    """
    size = held.numel() * held.element_size()
    if held.device.type != "cpu" or size < SMALLEST or is_mapped(held):
        return
    try:
        number, name = tempfile.mkstemp(prefix="progscale-", suffix=".partition", dir=folder)
        try:
            with open(number, "wb", buffering=0) as file:
                # Written and not mapped first: a full disk is then an error, and no signal that ends the process.
                left = held.detach().view(-1).view(torch.uint8).numpy().data
                while left:
                    left = left[file.write(left) :]
            mapped = torch.from_file(name, shared=True, size=held.numel(), dtype=held.dtype)
        finally:
            os.unlink(name)
    except OSError as error:
        raise UserError(f"{KEY}: {size} bytes cannot be written to '{folder}' ({error.strerror})") from error
    held.data = mapped.view(held.shape)
    vars(held)["mapped_at"] = held.data_ptr()


def is_mapped(held: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in a file of `to_file`."""
    # DeepSpeed gives the same tensor other memory when it becomes live.
    return getattr(held, "mapped_at", None) == held.data_ptr()


def check_folder(folder: Path, needed: int) -> str:
    """Looks whether partitions can be written to a folder.

    Args:
        folder: as `folder_of` gives it.
        needed: bytes that this machine's ranks will put there.

    Returns:
        What was found.

    Raises:
        UserError: it is no folder, cannot be written, or has too little room.
    """
    if not folder.is_dir():
        raise UserError(f"{KEY}: '{folder}' is not a folder; make one on a disk of this machine")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        about = os.statvfs(folder)
    except OSError as error:
        raise UserError(f"{KEY}: '{folder}' cannot be written ({error.strerror})") from error
    free = about.f_bavail * about.f_frsize
    found = f"{needed / 2**20:.1f} MiB for partitions of the parameters, of {free / 2**20:.1f} MiB free in {folder}"
    if needed > free:
        raise UserError(f"{KEY}: {found}; take a folder on a larger disk, or more machines")
    return found
