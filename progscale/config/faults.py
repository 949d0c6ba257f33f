"""Pydantic's errors → our messages: what was given, where, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from progscale.config.kinds import accepts
from progscale.config.read import KeyPath, dotted, show
from progscale.config.schema import SECTIONS, Config
from progscale.errors import Fault, nearest


def from_pydantic(
    error: ValidationError,
    where: Callable[[KeyPath], str],
    *,
    prefix: KeyPath = (),
    fields: Mapping[str, FieldInfo] | None = None,
) -> list[tuple[Fault, KeyPath]]:
    """One fault for each wrong value, with its path.

    Args:
        error: from validating a whole config, or options below `prefix`.
        where: gives " (from …)" for a path.
        prefix: of what was validated.
        fields: of the options, by name.
    """
    depth = 2 if fields is None else 1
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors():
        grouped.setdefault((*prefix, *_path(details["loc"], depth)), []).append(details)
    return [(_fault(path, details, where, _field(path, prefix, fields)), path) for path, details in grouped.items()]


def _path(loc: tuple[int | str, ...], depth: int) -> KeyPath:
    """The location without the names of union members that pydantic puts into it; a stack's name is no such one."""
    by_stack = loc[depth : depth + 1] == ("object",)
    path = [str(part) for part in loc[:depth]]
    path += [str(part) for place, part in enumerate(loc[depth:]) if isinstance(part, int) or (by_stack and place == 1)]
    return tuple(path)


def _field(path: KeyPath, prefix: KeyPath, fields: Mapping[str, FieldInfo] | None) -> FieldInfo | None:
    """The option that a path names; None for what lies inside a list."""
    if fields is not None:
        return fields.get(path[-1]) if len(path) == len(prefix) + 1 else None
    section = SECTIONS.get(path[0])
    if section is None:
        return Config.model_fields.get(path[0])
    return section.model_fields.get(path[1]) if len(path) == 2 else None


def _fault(path: KeyPath, details: list[ErrorDetails], where: Callable[[KeyPath], str], field: FieldInfo | None) -> Fault:
    value = details[0]["input"]
    phrases = [_phrase(one) for one in details]
    needs = phrases[0] + "".join(" or " + phrase.removeprefix("must be ") for phrase in phrases[1:])
    if details[0]["type"] == "missing" or details[0]["type"] == "extra_forbidden":
        return Fault(dotted(path), needs)
    if field is not None and "null" in accepts(field) and value is not None:
        needs += ", or null"
    return Fault(dotted(path), f"{show(value)}{where(path)} {needs}{_hint(value, details, where(path))}")


def _hint(value: Any, details: list[ErrorDetails], source: str) -> str:
    kinds = {one["type"] for one in details}
    if kinds & {"int_type", "float_type"} and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return "; write it without quotes"
    if "string_type" in kinds and "--set" in source:
        return f"; quote it twice to keep it a string: '\"{value}\"'"
    if "literal_error" in kinds and isinstance(value, str):
        return nearest(value, [choice.strip("'") for choice in _choices(details)])
    return ""


def _choices(details: list[ErrorDetails]) -> list[str]:
    text = next(one["ctx"]["expected"] for one in details if one["type"] == "literal_error")
    return str(text).replace(" or ", ", ").split(", ")


def _phrase(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    kind = details["type"]
    if kind == "literal_error":
        choices = _choices([details])
        return f"must be {choices[0]}" if len(choices) == 1 else f"must be one of {', '.join(choices)}"
    if kind == "said":
        return details["msg"]
    template = _PHRASES.get(kind)
    return (
        template.format(**{name: _number(bound) for name, bound in context.items()})
        if template
        else f"is not allowed: {details['msg']}"
    )


def _number(bound: Any) -> str:
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)


_PHRASES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_short": "must not be empty",
    "string_too_long": "must be at most {max_length} characters",
    "string_unicode": "must be valid Unicode",
    "extra_forbidden": "unknown key",
}
