"""Memory and file systems of this machine, as Linux tells of them; 0 and "not known" on systems that do not."""

from __future__ import annotations

from pathlib import Path


def machine_memory() -> tuple[int, int]:
    """Bytes of memory in all and available, a container's limit included."""
    return memory_of(read("/proc/meminfo"), Path("/sys/fs/cgroup"), read("/proc/self/cgroup"))


def available_bytes() -> int:
    """Bytes that this process may still take."""
    total, available = machine_memory()
    # Of a container's limit what is resident here is gone; without a limit it is no part of what is available.
    return max(0, min(available, total - status_bytes("VmRSS")))


def memory_of(meminfo: str, root: Path, own: str) -> tuple[int, int]:
    """Bytes of memory in all and available, by /proc/meminfo and the limits of the cgroups in /proc/self/cgroup, v1 or v2.

    What a cgroup has in use counts its page cache, which it gives back: so only the limit bounds what is available.
    """
    kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("Mem")}
    total = kib.get("MemTotal", 0) * 1024
    for controllers, path in (line.split(":", 2)[1:] for line in own.splitlines()):
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = base / path.lstrip("/")
        # In a container the path may be the host's; the limit then stands at the top. "max" is none.
        limits = (read(place / name).strip() for place in (folder, *folder.parents) if controllers in ("", "memory"))
        total = min([total, *(int(limit) for limit in limits if limit.isdigit())])
    return total, min(total, kib.get("MemAvailable", 0) * 1024)


def status_bytes(key: str) -> int:
    """An entry of /proc/self/status in bytes; 0 on systems without it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def file_system(folder: Path, mounts: str) -> str:
    """The kind of file system that a folder without links is on, by the content of /proc/mounts; "not known" without it."""
    places = [line.split()[1:3] for line in mounts.splitlines()]
    # The longest path holds the folder; of several file systems on one path the last one is seen.
    fits = [(len(where), index, kind) for index, (where, kind) in enumerate(places) if folder.is_relative_to(where)]
    return max(fits)[2] if fits else "not known"


def read(path: str | Path) -> str:
    """A file's content; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
