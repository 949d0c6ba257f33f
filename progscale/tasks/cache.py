"""Tokenised data on disk: arrays keyed by what they were made from, written once however many ranks start together."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Goes into every key: a change of what is stored makes old files unreachable instead of wrong.
FORMAT = 1
DIGEST_BYTES = 32
PLAIN_PROGRESS_SECONDS = 10.0

log = logging.getLogger("progscale.data")
# Any rank may be the one that works while the others wait: its progress is shown, whichever it is.
progress = logging.getLogger("progscale.progress")

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
    """`$PROGSCALE_CACHE`, or `~/.cache/progscale`."""
    named = os.environ.get("PROGSCALE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "progscale"


def fingerprint_texts(*columns: Sequence[str] | None) -> str:
    """SHA-256 of columns of text, their order and their boundaries."""
    digest = hashlib.sha256()
    for column in columns:
        if column is None:
            digest.update(b"none")
            continue
        lengths = np.fromiter(map(len, column), dtype=np.int64, count=len(column))
        digest.update(len(column).to_bytes(8, "little") + lengths.tobytes())
        digest.update("".join(column).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str | None:
    """SHA-256 of all that decides a fast tokenizer's output; None for a slow one, whose output is not cached.

    Truncation and padding are left out: they are a state that each call sets anew.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation", None)
    backend.pop("padding", None)
    parts = [type(tokenizer).__name__, tokenizer.truncation_side, list(tokenizer.model_input_names), backend]
    # A release may mend a tokenizer's output, and these two are not in the backend's own description.
    parts += [version("tokenizers"), getattr(tokenizer, "split_special_tokens", False), getattr(tokenizer, "cls_token_id", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def cached(key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `key`: from the cache, or built and put there.

    Of several processes that ask at once one builds, the others wait and read: one of all machines that share the folder, or one
    of each machine where the folder's file system has no locks. A file that is cut short or changed is built again. Where the
    folder cannot be written, every process builds its own and says so.

    Args:
        key: everything the arrays depend on, as JSON values; None as the tokenizer's fingerprint turns the cache off.
        build: makes the arrays.
    """
    if key.get("tokenizer", "") is None:
        return build()
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = cache_dir() / "tokenized" / f"{hashlib.sha256(text.encode()).hexdigest()}.bin"
    if (arrays := _load(path)) is not None:
        return arrays
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        stack.enter_context(_on_this_machine(path.stem))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(NotImplementedError):  # no locks there: this machine's own is held
                stack.enter_context(FileLock(path.with_suffix(".lock")))
        except OSError as error:
            stack.close()
            log.warning("tokenised data is not kept: %s cannot be used (%s); set PROGSCALE_CACHE", path.parent, error)
            return build()
        if (arrays := _load(path)) is not None:
            return arrays
        arrays = build()
        try:
            _save(path, arrays)
        except OSError as error:
            log.warning("tokenised data is not kept: writing %s failed (%s)", path, error)
        return arrays


@contextlib.contextmanager
def _on_this_machine(name: str) -> Iterator[None]:
    """Within, no other process of this user on this machine; without a folder for such a lock, nothing."""
    from filelock import FileLock

    folder = Path(tempfile.gettempdir()) / f"progscale-{os.getuid()}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            folder.mkdir(mode=0o700, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{name}.lock"))
        yield


def _save(path: Path, arrays: Arrays) -> None:
    """Writes beside the target and renames: a reader sees the whole file or none."""
    payload = io.BytesIO()
    np.savez(payload, allow_pickle=False, **arrays)
    view = payload.getbuffer()
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(view).digest())
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _load(path: Path) -> Arrays | None:
    """The arrays of a file; None where there is no file, or one whose digest does not fit."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    view = memoryview(data)
    if hashlib.sha256(view[DIGEST_BYTES:]).digest() != bytes(view[:DIGEST_BYTES]):
        log.warning("%s is damaged: it is built again", path)
        return None
    with np.load(io.BytesIO(view[DIGEST_BYTES:]), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def batches_with_progress(total: int, size: int, what: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of each batch, showing how far the work is: a bar on a terminal, now and then a line elsewhere.

    Args:
        total: rows.
        size: rows of a batch.
        what: is being done ("tokenising train").
    """
    bar = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        # The delay keeps work that is over at once from flashing a bar.
        bar = tqdm(total=total, desc=what, unit=" rows", unit_scale=True, delay=1.0, leave=False)
    last = time.monotonic()
    try:
        for begin in range(0, total, size):
            end = min(begin + size, total)
            yield begin, end
            if bar is not None:
                bar.update(end - begin)
            elif time.monotonic() - last > PLAIN_PROGRESS_SECONDS:
                last = time.monotonic()
                progress.info("%s: %d of %d rows", what, end, total)
    finally:
        if bar is not None:
            bar.close()
