"""From a file or a `--set` to a plain tree of values, with every fault of the text itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from progscale.errors import ConfigError, Fault, nearest

KeyPath = tuple[str, ...]

# No section needs as much; deeper input is a mistake, and would exhaust Python's stack.
MAX_DEPTH = 40

# The one key of a file that is neither a section nor a description: the files that come before it.
INCLUDE = "include"


@dataclass(frozen=True)
class Layer:
    """One source of values.

    Attributes:
        source: what messages call it: the file as the user or the file that includes it named it, or "--set".
        tree: its values, nested as in the file.
        set_path: the key of a `--set`, which may overrule a DeepSpeed value without a conflict; None for a file.
    """

    source: str
    tree: dict[str, Any]
    set_path: KeyPath | None = None


class _Object(dict[str, Any]):
    """A JSON object that remembers keys given twice, which Python's json would drop."""

    duplicates: tuple[str, ...] = ()

    @classmethod
    def from_pairs(cls, pairs: list[tuple[str, Any]]) -> _Object:
        made = cls(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            made.duplicates = tuple(sorted({key for key in keys if keys.count(key) > 1}))
        return made


def dotted(path: Iterable[str]) -> str:
    """The key as messages and `--set` write it."""
    return ".".join(path)


def show(value: Any) -> str:
    """A value as it stands in the file, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
        text.encode()
    except (ValueError, RecursionError):
        text = ascii(value)
    return text if len(text) <= 80 else text[:60] + " …"


def read_layers(path: str | Path | Mapping[str, Any], faults: list[Fault]) -> list[Layer]:
    """A file as a layer, behind those of the files that it includes; what is wrong with them is appended to `faults`.

    `include` lists files, relative to the file that names them, which may include others. A file that several of them name
    comes once, where it is first named: before all that build on it. A mapping stands for a file's content, and includes nothing.
    """
    if not isinstance(path, Mapping):
        return _read_tree(Path(path), {}, set(), faults)
    layer = Layer("a mapping", _clean(dict(path), (), "a mapping", faults))
    if INCLUDE in layer.tree:
        faults.append(Fault(INCLUDE, f"only a file can include others (from {layer.source}); give those before it, as layers"))
        del layer.tree[INCLUDE]
    return [layer]


def _read_tree(path: Path, above: Mapping[str, Path], seen: set[str], faults: list[Fault]) -> list[Layer]:
    """The layers of `path`.

    Args:
        path: a file that is in neither `above` nor `seen`.
        above: identity → name of the files that led to it, the first one first.
        seen: identities of all files that were read.
        faults: appended to.
    """
    own: list[Fault] = []
    layer = _read_file(path, own)
    if layer is None and above:
        *_, parent = above.values()
        own = [replace(fault, message=f"{fault.message} (included by {parent})") for fault in own]
    faults.extend(own)
    line = {**above, _identity(path): path}
    seen.update(line)
    if layer is None:
        return []
    found: list[Layer] = []
    for name in _take_includes(layer, faults):
        inner = _beside(path, name)
        same = _identity(inner)
        if same in line:
            circle = [*list(line.values())[list(line).index(same) :], inner]
            faults.append(Fault(INCLUDE, f"{' → '.join(map(str, circle))}: a file cannot include itself (in {path})"))
        elif len(line) > MAX_DEPTH:
            faults.append(Fault(INCLUDE, f"more than {MAX_DEPTH} files include each other (in {path})"))
        elif same not in seen:
            found.extend(_read_tree(inner, line, seen, faults))
    return [*found, layer]


def _take_includes(layer: Layer, faults: list[Fault]) -> list[str]:
    """What a file's `include` lists; the key is taken out of the layer."""
    if INCLUDE not in layer.tree:
        return []
    names = layer.tree.pop(INCLUDE)
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return names
    example = f"[{show(names)}]" if isinstance(names, str) and names else '["../models/bert-base.json"]'
    faults.append(Fault(INCLUDE, f"{show(names)} (from {layer.source}) must be a list of JSON files, e.g. {example}"))
    return []


def _beside(path: Path, name: str) -> Path:
    """The file that `path` calls `name`, without `..` where that is the same file: behind a linked folder it is not."""
    joined = path.parent / name
    short = Path(os.path.normpath(joined))
    return short if _identity(short) == _identity(joined) else joined


def _identity(path: Path) -> str:
    """The same for all names of a file."""
    try:
        return os.path.realpath(path)
    except ValueError:  # A NUL: no file is called so, which reading it will say.
        return str(path)


def _read_file(path: Path, faults: list[Fault]) -> Layer | None:
    """Reads one file; a byte-order mark at its start is harmless and accepted."""
    source = str(path)
    text = _read_text(path, faults)
    if text is None:
        return None
    if not text.strip():
        faults.append(Fault("", f"{source}: the file is empty; a layer is a JSON object, at least {{}}"))
        return None
    try:
        value = json.loads(text, object_pairs_hook=_Object.from_pairs)
    except json.JSONDecodeError as error:
        faults.append(Fault("", f"{source}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"))
        return None
    except (ValueError, RecursionError):
        # A number of thousands of digits, or thousands of nested brackets.
        faults.append(Fault("", f"{source}: not usable JSON: a number is too long or the nesting too deep"))
        return None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        faults.append(Fault("", f"{source}: {kind} at the top; a layer is a JSON object {{…}}"))
        return None
    return Layer(source, _clean(value, (), source, faults))


def _read_text(path: Path, faults: list[Fault]) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        faults.append(Fault("", f"{path}: no such file{_nearby(path)}"))
    except IsADirectoryError:
        faults.append(Fault("", f"{path}: is a folder; name a JSON file in it"))
    except UnicodeDecodeError as error:
        faults.append(Fault("", f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"))
    except OSError as error:
        faults.append(Fault("", f"{path}: cannot be read: {error.strerror or error}"))
    except ValueError:
        faults.append(Fault("", f"{str(path)!a}: not a file name"))
    return None


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.glob("*.json"))
    return nearest(path.name, names) or (f"; {folder} holds {', '.join(names[:12])}" if names else "")


def _clean(value: Any, path: KeyPath, source: str, faults: list[Fault]) -> dict[str, Any]:
    """A plain copy of an object without the values that no option can take; each of them is a fault."""
    for key in getattr(value, "duplicates", ()):
        faults.append(Fault(dotted((*path, key)), f"given twice (in {source}); keep one"))
    clean: dict[str, Any] = {}
    for key, inner in value.items():
        if not isinstance(key, str):
            faults.append(Fault(dotted(path), f"{key!r} (in {source}) is not a string; keys are strings"))
            continue
        kept, keep = _clean_value(inner, (*path, key), source, faults)
        if keep:
            clean[key] = kept
    return clean


def _clean_value(value: Any, path: KeyPath, source: str, faults: list[Fault]) -> tuple[Any, bool]:
    if len(path) > MAX_DEPTH:
        faults.append(Fault(dotted(path[:3]), f"nested more than {MAX_DEPTH} deep (in {source})"))
        return None, False
    if isinstance(value, Mapping):
        return _clean(value, path, source, faults), True
    if isinstance(value, list | tuple):
        pairs = [_clean_value(item, (*path, str(index)), source, faults) for index, item in enumerate(value)]
        return [item for item, _ in pairs], all(keep for _, keep in pairs)
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(Fault(dotted(path), f"{show(value)} (from {source}) must be a finite number"))
        return None, False
    return value, True


def parse_set(text: str) -> tuple[KeyPath, Any]:
    """Splits a `--set` into its key and value: JSON where it is JSON, else the text itself.

    >>> parse_set("train.epochs=3"), parse_set("task.name=cola")
    ((('train', 'epochs'), 3), (('task', 'name'), 'cola'))

    Raises:
        ConfigError: no `=`, an empty key, a key given twice inside the value, or a value that is not finite.
    """
    faults: list[Fault] = []
    layer = read_set(text, faults)
    if layer is None or faults:
        raise ConfigError(faults)
    path: KeyPath = tuple(text.partition("=")[0].strip().split("."))
    value: Any = layer.tree
    for part in path:
        value = value[part]
    return path, value


def format_set(path: Sequence[str], value: Any) -> str:
    """The `--set` text for a key and value; `parse_set` reads it back.

    >>> format_set(("optimizer", "betas"), [0.9, 0.98])
    'optimizer.betas=[0.9, 0.98]'
    """
    return f"{dotted(path)}={json.dumps(value)}"


def read_set(text: str, faults: list[Fault]) -> Layer | None:
    """A `--set` as a layer of its own; what is wrong with it is appended to `faults`."""
    key, equals, raw = text.partition("=")
    path = tuple(key.strip().split("."))
    # The key stands before every message, so the option's text is only needed where there is no key.
    shown = f"--set {text}" if len(text) <= 60 else f"--set {text[:60]} …"
    source = "--set"
    if not equals:
        faults.append(Fault("", f"{shown}: no '='; write --set section.key=value, e.g. --set optimizer.lr=3e-5"))
        return None
    if not all(path):
        faults.append(Fault("", f"{shown}: an empty key; write --set section.key=value, e.g. --set optimizer.lr=3e-5"))
        return None
    if path[0] == INCLUDE:
        faults.append(Fault(INCLUDE, f"only a file can include others (from {source}); give them with --config FILE"))
        return None
    if len(path) > MAX_DEPTH:
        faults.append(Fault("", f"{shown}: nested more than {MAX_DEPTH} deep"))
        return None
    try:
        value = json.loads(raw, object_pairs_hook=_Object.from_pairs)
    except json.JSONDecodeError:
        value = raw
    except (ValueError, RecursionError):
        faults.append(Fault(dotted(path), f"not usable JSON (from {source}): too long a number or too deep a nesting"))
        return None
    tree: Any = value
    for part in reversed(path):
        tree = {part: tree}
    found: list[Fault] = []
    cleaned = _clean(tree, (), source, found)
    faults.extend(found)
    return None if found else Layer(source, cleaned, set_path=path)
