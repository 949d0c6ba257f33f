"""What a checkpoint consists of: every file with its size and SHA-256, in a file that vouches for itself. No torch.

The manifest's bytes are one canonical form of its content and hold a digest of it, so that any flipped bit shows. Only
names of two fixed forms are accepted: nothing in a manifest can point outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progscale.errors import RejectedError

FORMAT = "progscale-checkpoint-1"
MANIFEST = "manifest.json"
STATE = "state.json"
SHARD_NAME = re.compile(r"rank[0-9]{5}-[0-9]{5}\.safetensors")
# A run of a thousand stages on a thousand ranks stays far below; a file that claims more is not read into memory.
LARGEST_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FileInfo:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        step: optimizer steps done.
        files: by name; "state.json" is always among them.
    """

    step: int
    files: Mapping[str, FileInfo]

    def to_bytes(self) -> bytes:
        """The canonical form."""
        files = {name: {"bytes": info.bytes, "sha256": info.sha256} for name, info in sorted(self.files.items())}
        content = {"format": FORMAT, "step": self.step, "files": files}
        return canonical({**content, "digest": hashlib.sha256(canonical(content)).hexdigest()})


def canonical(content: Any) -> bytes:
    """JSON with sorted keys, the same bytes for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        RejectedError: it is missing, damaged, or of another format.
    """
    raw = read_small(folder, MANIFEST)
    content = parse_json(folder, MANIFEST, raw)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise RejectedError(folder, f"{MANIFEST}: format {found!r} instead of {FORMAT!r}")
    files, step = content.get("files"), content.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(files, dict):
        raise RejectedError(folder, f"{MANIFEST} is damaged: no step or no files")
    manifest = Manifest(step, {name: _file_info(folder, name, entry) for name, entry in files.items()})
    if manifest.to_bytes() != raw:
        raise RejectedError(folder, f"{MANIFEST} is damaged: its digest does not fit its content")
    if STATE not in manifest.files:
        raise RejectedError(folder, f"{MANIFEST} lists no {STATE}")
    return manifest


def _file_info(folder: Path, name: str, entry: Any) -> FileInfo:
    if name != STATE and not SHARD_NAME.fullmatch(name):
        raise RejectedError(folder, f"{MANIFEST} names {name[:200]!r}, which no checkpoint has: only files in its own folder")
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(sha256, str):
        raise RejectedError(folder, f"{MANIFEST} is damaged: {name} has no size or hash")
    return FileInfo(size, sha256)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Refuses a checkpoint of which a file is missing, is no plain file, or has another size.

    Raises:
        RejectedError: naming the file.
    """
    for name, info in manifest.files.items():
        size = plain_file_bytes(folder, name)
        if size != info.bytes:
            raise RejectedError(folder, f"{name} has {size} bytes instead of {info.bytes}")


def check_hash(folder: Path, name: str, info: FileInfo) -> None:
    """Reads a whole file and compares its hash.

    Raises:
        RejectedError: it differs.
    """
    try:
        with open_plain(folder, name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RejectedError(folder, f"{name} cannot be read ({error.strerror})") from error
    if digest != info.sha256:
        raise RejectedError(folder, f"{name} is damaged: its SHA-256 is not that of the manifest")


def plain_file_bytes(folder: Path, name: str) -> int:
    """Size of a file that is no link and no folder.

    Raises:
        RejectedError: it is missing or something else.
    """
    try:
        status = os.lstat(folder / name)
    except OSError as error:
        raise RejectedError(folder, f"{name} is missing ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise RejectedError(folder, f"{name} is no plain file")
    return status.st_size


def open_plain(folder: Path, name: str) -> Any:
    """Opens a file for reading, and never what a link points to."""
    return open(os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")


def read_small(folder: Path, name: str) -> bytes:
    """The content of a JSON file.

    Raises:
        RejectedError: it is missing, is no plain file, or is larger than any real one.
    """
    size = plain_file_bytes(folder, name)
    if size > LARGEST_JSON_BYTES:
        raise RejectedError(folder, f"{name} has {size} bytes, more than any real one")
    try:
        with open_plain(folder, name) as file:
            return bytes(file.read())
    except OSError as error:
        raise RejectedError(folder, f"{name} cannot be read ({error.strerror})") from error


def parse_json(folder: Path, name: str, raw: bytes) -> Any:
    """The content of a JSON file.

    Raises:
        RejectedError: it is no JSON.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RejectedError(folder, f"{name} is damaged: no JSON ({error})") from error
