"""launch/slurm/train.sbatch filled in for a job: whole, so that `sbatch FILE` submits it again, from any folder and any shell."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import progscale
from progscale.errors import UserError
from progscale.submit.request import TEMPLATE, Job, Request

# What the template and the nodes read; those of the submitting shell go into the script, so that it is whole.
VARIABLES = (
    *("PROGSCALE_SETUP", "PROGSCALE_CONTAINER", "PROGSCALE_APPTAINER", "PROGSCALE_MOUNTS", "PROGSCALE_RANKS_PER_NODE"),
    *("PROGSCALE_MAX_RESTARTS", "PROGSCALE_JOIN_SECONDS", "PROGSCALE_HEAD_ADDRESS", "PROGSCALE_LOGS", "PROGSCALE_CACHE"),
)


@dataclass(frozen=True)
class Line:
    """A line of the filled script, without its end, and whether the template lacks it; an argument may hold line ends."""

    text: str
    is_new: bool = False


def fill_for(request: Request, job: Job, path: Path) -> list[Line]:
    """The script of a job that is to lie at `path`."""
    template = (job.home / TEMPLATE).read_text(encoding="utf-8")
    head = [
        f"# {TEMPLATE}, filled in by progscale submit {progscale.__version__}. Again, with more options of train's if need be:",
        f"#   sbatch {shlex.quote(str(path.absolute()))}",
        "# docs/slurm.md tells how it works.",
    ]
    return fill(template, head, directives_of(request, job), exports_of(request, job), arguments_of(request, job, path))


def fill(
    template: str, head: Sequence[str], directives: Mapping[str, str | None], exports: Sequence[str], arguments: Sequence[str]
) -> list[Line]:
    """The template with lines of its own.

    Args:
        template: text of train.sbatch.
        head: comments behind the first line, instead of the template's.
        directives: sbatch's long options; a value of None stands for none. They replace those of the template.
        exports: lines of shell.
        arguments: of the run, each a quoted text; what sbatch gets behind the file's name comes after them.
    """
    first, *old = template.splitlines()
    old = old[next(index for index, text in enumerate(old) if text.startswith("#SBATCH")) :]
    lines = [Line(first), *(Line(text, is_new=True) for text in head)]
    left = dict(directives)
    last = max(index for index, text in enumerate(old) if text.startswith("#SBATCH"))
    for index, text in enumerate(old):
        name = text.removeprefix("#SBATCH --").partition("=")[0] if text.startswith("#SBATCH --") else None
        if name == "requeue" and "no-requeue" in directives:
            continue
        if name in left:
            made = directive(name, left.pop(name))
            lines.append(Line(made, is_new=made != text))
        else:
            lines.append(Line(text))
        if index == last:
            lines += [Line(directive(*item), is_new=True) for item in left.items()]
        if text == "set -euo pipefail":
            lines += [Line(text, is_new=True) for text in (*exports, " \\\n  ".join(["set --", *arguments, '"$@"']))]
    return lines


def text_of(lines: Sequence[Line]) -> str:
    """What goes into the file."""
    return "".join(line.text + "\n" for line in lines)


def directive(name: str, value: str | None) -> str:
    """A line for sbatch, which takes quotes as a shell does."""
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={shlex.quote(value)}"


def directives_of(request: Request, job: Job) -> dict[str, str | None]:
    """The options of sbatch."""
    wanted = job.wanted
    found: dict[str, str | None] = {"job-name": job.name, "nodes": str(wanted.nodes)}
    if wanted.gpus is not None:
        found["gpus-per-node"] = str(wanted.gpus)
    # Without GPUs and a number SLURM's default, one, is that of a rank.
    if wanted.cpus_per_rank is not None or wanted.ranks > 1:
        found["cpus-per-task"] = str((wanted.cpus_per_rank or 1) * wanted.ranks)
    for name in ("mem", "time", "partition", "account", "qos"):
        value = getattr(request, name)
        if value is not None:
            found[name] = value
    if job.has_lines or request.array is not None:
        found["array"] = request.array or f"1-{len(job.runs)}"
        found["output"] = "%x-%A_%a.out"
    found["signal"] = f"B:USR1@{request.signal_seconds}"
    if request.max_restarts == 0:
        # Else SLURM itself would queue it again when a node dies.
        found["no-requeue"] = None
    # Paths of the config are relative to it, wherever the file is submitted from.
    found["chdir"] = os.getcwd()
    for text in request.sbatch:
        name, given, value = text.removeprefix("--").partition("=")
        found[name] = value if given else None
    return found


def exports_of(request: Request, job: Job) -> list[str]:
    """The lines by which the script finds the checkout and whatever the nodes need."""
    values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    given: dict[str, str | int | None] = {
        "PROGSCALE_SETUP": absolute(request.setup),
        "PROGSCALE_CONTAINER": absolute(request.container),
        "PROGSCALE_APPTAINER": absolute(request.apptainer),
        # What was checked is what runs.
        "PROGSCALE_RANKS_PER_NODE": job.wanted.ranks,
        "PROGSCALE_MAX_RESTARTS": request.max_restarts,
    }
    if request.apptainer is not None:
        values["PROGSCALE_CONTAINER"] = ""  # it would win, and the job inherits this shell's
    values |= {name: str(value) for name, value in given.items() if value is not None}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in {"PROGSCALE_HOME": str(job.home), **values}.items()]
    own = Path(sys.executable).parent
    # The nodes take `accelerate` from the path: it is to be this environment's, from whichever shell the file is submitted.
    if (own / "accelerate").exists() and not {"PROGSCALE_SETUP", "PROGSCALE_CONTAINER", "PROGSCALE_APPTAINER"} & set(values):
        lines.append(f'export PATH={shlex.quote(str(own))}:"$PATH"')
    return lines


def absolute(name: str | None) -> str | None:
    """A file's absolute path; the name of an image in a registry stays as it is."""
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def arguments_of(request: Request, job: Job, path: Path) -> list[str]:
    """The arguments of train.sbatch, an option with its value in one quoted text."""
    pairs: list[tuple[str, ...]] = []
    if job.has_lines:
        # The script reads it where it stands first.
        pairs.append(("--each", str(path.with_suffix(".txt").absolute())))
    pairs += [("--config", name) for name in request.config]
    pairs += [("--set", text) for text in request.set]
    pairs += [("--plugin", module) for module in request.plugin]
    if request.resume is not None:
        pairs.append(("--resume", request.resume))
    pairs += [("--allow-pickle",)] * request.allow_pickle + [("--trust-remote-code",)] * request.trust_remote_code
    return [shlex.join(pair) for pair in pairs]


def free_path(folder: Path, name: str) -> Path:
    """A name for the script that no file has, nor any beside it."""
    stem = f"{re.sub('[^A-Za-z0-9._+-]', '-', name)}-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while any((folder / f"{stem}{ending}").exists() for ending in (".sbatch", ".txt")):
        number += 1
        stem = f"{stem.removesuffix(f'.{number - 1}')}.{number}"
    return folder / f"{stem}.sbatch"


def write(path: Path, script: str, lines: str) -> None:
    """Writes the script, and beside it the lines of an array; never over a file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((path.with_suffix(".txt"), lines), (path, script)):
            if text:
                with file.open("x", encoding="utf-8", errors="surrogateescape") as out:
                    out.write(text)
    except OSError as error:
        raise UserError(f"submit: {error.filename} cannot be written ({error.strerror})") from error
