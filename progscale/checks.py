"""One thing that was looked at before a run, and how it is told."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from progscale.errors import UserError

Status = Literal["ok", "note", "problem"]


class Check(NamedTuple):
    """One thing that was looked at; `name` is "section: what", and every problem has a remedy."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def told(name: str, found: str, check: Callable[..., Any], *args: Any, remedy: str = "", status: Status = "problem") -> Check:
    """`found`, perhaps "THING is {}" to be filled by what `check` returns; if it refuses, its message, with `status`."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # JSON goes there
            return Check(name, "ok", found.replace("{}", str(check(*args))))
    except (UserError, OSError, ImportError, ValueError, OverflowError) as error:
        thing, filled, _ = found.partition(" is {}")
        reason = f"{thing}: {error.strerror}" if filled and isinstance(error, OSError) else str(error)
        message, _, own = reason.partition("; ")
        return Check(name, status, message, remedy or own or "change what it names")


def size(count: int) -> str:
    """Bytes for people: "1.5 GiB"."""
    unit, scale = next(((u, s) for u, s in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)) if count >= s), ("KiB", 2**10))
    return f"{count / scale:.1f} {unit}"
