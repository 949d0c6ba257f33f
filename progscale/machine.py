"""What figures depend on beside the options: the processor, its cores, the memory, the command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path


def processor() -> str:
    """The processor's name, as its maker gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Of the machine; None where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def command_line() -> str:
    """The command that started this process, without the folder of its program."""
    program, *arguments = sys.argv
    return shlex.join([Path(program).name or "python", *arguments])
