"""Errors meant for the person who started the run: one message, no traceback.

Every message says what was given, what is allowed and which key to change. `exit_code` is what the
command line returns: 1 for a crash or a checkpoint that cannot be written, 2 for a mistake in the input, 3 for a run
stopped by its own checks, 75 for one that was told to stop and can go on later.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class ProgscaleError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1


class UserError(ProgscaleError):
    """The input cannot work: config, model, data or schedule."""

    exit_code = 2


class ModelError(UserError):
    """The model cannot be found, loaded, or cut into embeddings, blocks and head."""


class DataError(UserError):
    """The data cannot be found, read, or used for the task."""


class ScheduleError(UserError):
    """The schedule does not fit the model or the number of optimizer steps."""


class ReportError(UserError):
    """A run folder cannot be read, or runs cannot be compared."""


class RegistryError(UserError):
    """A name is not registered, or registered twice."""


class NonFiniteError(ProgscaleError):
    """The loss or a gradient is NaN or infinite on some rank; no weight was changed by that step."""

    exit_code = 3


class AuditError(ProgscaleError):
    """A frozen tensor changed its bits, or a live one has no optimizer state."""

    exit_code = 3


class LaunchError(UserError):
    """What the launcher tells this process of its rank cannot be; other ranks may have been told something else."""


class NetworkError(ProgscaleError):
    """Nodes are missing, or cannot reach each other; nothing has begun."""


class WriteError(ProgscaleError):
    """A file of the run could not be written; what was there is untouched."""


class CheckpointError(WriteError):
    """A checkpoint could not be written; those that were there are untouched."""


class RejectedError(UserError):
    """A checkpoint is damaged, incomplete, not of this run, or not there at all.

    Args:
        path: of the checkpoint.
        reason: what is wrong, naming the file.
    """

    def __init__(self, path: object, reason: str) -> None:
        # Names come from files that anybody may have written.
        self.path = printable(str(path))
        self.reason = printable(reason)
        super().__init__(f"checkpoint {self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type[RejectedError], tuple[str, str]]:
        # It is sent to other ranks; by default it would be rebuilt from the message alone.
        return RejectedError, (self.path, self.reason)


class PreemptedError(ProgscaleError):
    """The run was told to stop (SIGTERM, SIGUSR1, Ctrl-C); what it had reached is saved."""

    # EX_TEMPFAIL of sysexits.h: try again later.
    exit_code = 75


class FinishedError(ProgscaleError):
    """There is nothing to resume: the run has ended already."""

    exit_code = 0


@dataclass(frozen=True)
class Fault:
    """One mistake in a config: the dotted key, and what is wrong with it."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(UserError):
    """All mistakes of a config at once.

    Args:
        faults: every mistake found, in the order of the config.
        source: the file or option the faults come from, if it is one alone.
    """

    def __init__(self, faults: Sequence[Fault] | Fault | str, source: str | None = None) -> None:
        if isinstance(faults, str):
            faults = [Fault("", faults)]
        elif isinstance(faults, Fault):
            faults = [faults]
        self.faults = list(faults)
        lines = [str(fault) for fault in self.faults]
        head = f"{source}: " if source else ""
        if len(lines) == 1:
            super().__init__(head + lines[0])
        else:
            super().__init__(f"{head}{len(lines)} faults\n" + "\n".join(f"  - {line}" for line in lines))


def printable(text: str) -> str:
    r"""The text with escapes for what no terminal should get: control sequences, line ends, halves of characters.

    >>> printable("é\x1b[2J")
    'é\\x1b[2J'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The phrase `; did you mean 'x'?` for the closest allowed name, or an empty string.

    >>> nearest("sentense", ["sentence", "label"])
    "; did you mean 'sentence'?"
    """
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
