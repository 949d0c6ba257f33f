"""A suite's file → the configs of its runs, all of them checked before the first one begins."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from progscale.config import Config, dump_config, load_config
from progscale.errors import ConfigError, Fault, nearest
from progscale.names import name_faults, with_options

# In the order in which their layers come: what comes later wins.
AXES = ("models", "tasks", "methods", "schedules")
# More runs than anybody waits for; a slip of the pen should not make them.
MOST_RUNS = 10_000
FOLDER = "runs/suites"


class Include(BaseModel):
    """A point of an axis: config files, and sections that come behind them."""

    model_config = ConfigDict(extra="allow", strict=True)
    include: list[str] = Field(default_factory=list)


Point = Include | Annotated[str, Field(min_length=1)]


class Compare(BaseModel):
    """How the runs are set side by side in the end; see `progscale compare`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    reference: str | None = None
    score: Literal["last", "best"] = "last"
    metric: str | None = None


class SuiteFile(BaseModel):
    """What a suite's file may hold.

    Attributes:
        description: what it is for.
        include: config files under all runs, relative to this one.
        set: dotted key → value for all runs, above everything.
        models: name → a config file, or sections with an `include` of their own.
        tasks: the same.
        methods: the same.
        schedules: the same.
        seeds: of the runs; by default 42.
        files: instead of the four: patterns of config files, each of which is a run (times the seeds).
        leave_out: combinations that are not run, e.g. {"tasks": "cola", "schedules": "growing"}.
        compare: how the runs are set side by side.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    description: str = ""
    include: list[str] = Field(default_factory=list)
    set: dict[str, Any] = Field(default_factory=dict)
    models: dict[str, Point] = Field(default_factory=dict)
    tasks: dict[str, Point] = Field(default_factory=dict)
    methods: dict[str, Point] = Field(default_factory=dict)
    schedules: dict[str, Point] = Field(default_factory=dict)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[42], min_length=1)
    files: list[str] = Field(default_factory=list)
    leave_out: list[dict[str, str]] = Field(default_factory=list)
    compare: Compare = Field(default_factory=Compare)


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        name: of the run.
        point: axis → name, and "seed".
        config: whole.
        file: where its config is written.
    """

    name: str
    point: Mapping[str, str]
    config: Config
    file: Path

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.output_dir) / self.config.run_name


@dataclass(frozen=True)
class Suite:
    """All runs of a file.

    Attributes:
        name: of the file.
        folder: where runs, configs, logs and the comparison go.
        description: what it is for.
        cells: the runs; seeds outermost, so that one that is stopped early has all combinations with fewer seeds.
        compare: how they are set side by side.
    """

    name: str
    folder: Path
    description: str
    cells: tuple[Cell, ...]
    compare: Compare

    def write_configs(self) -> None:
        """Writes each run's config, so that it can be run alone."""
        for cell in self.cells:
            cell.file.parent.mkdir(parents=True, exist_ok=True)
            cell.file.write_text(json.dumps(dump_config(cell.config), indent=2) + "\n", encoding="utf-8")


def read_suite(path: str | Path, sets: Sequence[str] = (), folder: str | Path | None = None) -> Suite:
    """The runs of a suite's file.

    Args:
        path: of the file (JSON).
        sets: `section.key=value` for all runs, above everything that the file says.
        folder: where the runs go; by default runs/suites/NAME.

    Raises:
        ConfigError: with every fault of the file, and of the configs that it makes.
    """
    path = Path(path)
    content = read_file(path)
    taken = {"run.seed": "seeds", "run.name": "the axes' names", "run.output_dir": "--output"}
    given = [*content.set, *(text.partition("=")[0] for text in sets)]
    if wrong := [key for key in given if key in taken]:
        raise ConfigError([Fault(key, f"a suite gives it to its runs itself: by {taken[key]}") for key in dict.fromkeys(wrong)])
    target = Path(folder) if folder is not None else Path(FOLDER) / path.stem
    points = points_of(content, path)
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in content.set.items()), *sets]
    cells: list[Cell] = []
    faults: dict[Fault, list[str]] = {}
    for seed, (point, layers) in itertools.product(content.seeds, points):
        name = cell_name(content, point, seed)
        own = [f"run.name={json.dumps(name)}", f"run.output_dir={json.dumps(str(target / 'runs'))}", f"run.seed={seed}"]
        try:
            config = with_options(load_config(layers, [*overrides, *own], check=name_faults))
        except ConfigError as error:
            for fault in error.faults:
                # The sections of an axis stand in this file.
                shown = Fault(fault.key, fault.message.replace("(from a mapping)", f"(from {path})"))
                faults.setdefault(shown, []).append(name)
            continue
        cells.append(Cell(name, {**point, "seed": str(seed)}, config, target / "configs" / f"{name}.json"))
    for name, count in Counter(cell.name for cell in cells).items():
        if count > 1:
            faults.setdefault(Fault("", f"{count} runs would be called '{name}' (in {path}): give them other names"), [])
    if faults:
        raise ConfigError([told(fault, names, len(points) * len(content.seeds)) for fault, names in faults.items()])
    return Suite(path.stem, target, content.description, tuple(cells), content.compare)


def told(fault: Fault, names: Sequence[str], runs: int) -> Fault:
    """A fault with the runs that have it, where not all have."""
    if len(names) in (0, runs):
        return fault
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Fault(fault.key, f"{fault.message} (in {', '.join(names[:3])}{more})")


def read_file(path: Path) -> SuiteFile:
    """The file, checked for what it may hold.

    Raises:
        ConfigError: naming the key, what was given and what is allowed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Fault("", f"suite: '{path}' cannot be read ({error.strerror})")) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(Fault("", f"suite: '{path}' is no JSON: {error}")) from error
    if not isinstance(content, dict):
        raise ConfigError(Fault("", f"suite: '{path}' holds no JSON object"))
    try:
        found = SuiteFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(shape_faults(error, path)) from error
    faults = []
    axes = [axis for axis in AXES if getattr(found, axis)]
    if found.files and axes:
        faults.append(Fault("files", f"given beside {', '.join(axes)}, which make the runs themselves; keep one (in {path})"))
    if len(set(found.seeds)) < len(found.seeds):
        faults.append(Fault("seeds", f"{found.seeds} names a seed twice (in {path})"))
    for entry in found.leave_out:
        for axis, name in entry.items():
            if axis not in axes:
                faults.append(Fault("leave_out", f"'{axis}' is none of {', '.join(axes)}{nearest(axis, axes)} (in {path})"))
            elif name not in getattr(found, axis):
                names = list(getattr(found, axis))
                faults.append(
                    Fault("leave_out", f"'{name}' is none of {axis}: {', '.join(names)}{nearest(name, names)} (in {path})")
                )
    if faults:
        raise ConfigError(faults)
    return found


def shape_faults(error: ValidationError, path: Path) -> list[Fault]:
    """Pydantic's findings in our words, one for each key."""
    found: dict[str, Fault] = {}
    for details in error.errors():
        key = ".".join(str(part) for part in details["loc"] if part not in ("Include", "constrained-str"))
        if details["type"] == "extra_forbidden":
            known = list(Compare.model_fields if details["loc"][0] == "compare" else SuiteFile.model_fields)
            last = str(details["loc"][-1])
            message = f"unknown key; allowed: {', '.join(known)}{nearest(last, known)} (in {path})"
        else:
            message = f"{json.dumps(details['input'])[:80]} is not allowed: {details['msg']} (in {path})"
        found.setdefault(key, Fault(key, message))
    return list(found.values())


def points_of(content: SuiteFile, path: Path) -> list[tuple[dict[str, str], list[Any]]]:
    """Every combination with the layers of its config, without seeds.

    Raises:
        ConfigError: there are none, or too many; or a pattern that no file fits.
    """
    base = [str(path.parent / name) for name in content.include]
    found: list[tuple[dict[str, str], list[Any]]] = []
    if content.files:
        seen: set[str] = set()
        for pattern in content.files:
            try:
                files = sorted(path.parent.glob(pattern))
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(Fault("files", f"'{pattern}' is no pattern of files relative to {path} ({error})")) from error
            if not files:
                raise ConfigError(Fault("files", f"'{pattern}' fits no file below {path.parent} (in {path})"))
            # Two patterns may fit a file, which is one run all the same.
            found += [({"files": file.stem}, [*base, str(file)]) for file in files if str(file) not in seen]
            seen |= set(map(str, files))
        return check_count(found, content, path)
    axes = [axis for axis in AXES if getattr(content, axis)]
    for names in itertools.product(*(getattr(content, axis) for axis in axes)):
        point = dict(zip(axes, names, strict=True))
        if any(entry.items() <= point.items() for entry in content.leave_out if entry):
            continue
        layers = [layer for axis, name in point.items() for layer in layers_of(getattr(content, axis)[name], path)]
        found.append((point, [*base, *layers]))
    return check_count(found, content, path)


def check_count(
    found: list[tuple[dict[str, str], list[Any]]], content: SuiteFile, path: Path
) -> list[tuple[dict[str, str], list[Any]]]:
    """Refuses no runs, and more than anybody waits for."""
    runs = len(found) * len(content.seeds)
    if not found:
        raise ConfigError(Fault("leave_out", f"nothing is left to run (in {path})"))
    if runs > MOST_RUNS:
        raise ConfigError(Fault("seeds", f"{runs} runs; at most {MOST_RUNS} are allowed (in {path})"))
    return found


def layers_of(point: Point, path: Path) -> list[Any]:
    """Of a point of an axis, the last one wins."""
    if isinstance(point, str):
        return [str(path.parent / point)]
    own = dict(point.model_extra or {})
    return [*(str(path.parent / name) for name in point.include), *([own] if own else [])]


def cell_name(content: SuiteFile, point: Mapping[str, str], seed: int) -> str:
    """By what tells it from the others."""
    parts = [name for axis, name in point.items() if axis == "files" or len(getattr(content, axis)) > 1]
    if not parts:
        parts = list(point.values()) or ["run"]
    return re.sub(r"[^\w.+-]", "-", "-".join([*parts, f"s{seed}"]))
