"""What a field accepts, in the words of JSON."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "string",
    list: "list",
    dict: "object",
    type(None): "null",
}


def accepts(field: FieldInfo) -> list[str]:
    """The kinds of value a field takes: "number", "null", "list", or a choice in quotes."""
    return _kinds(field.annotation)


def type_text(field: FieldInfo) -> str:
    """The same as one phrase for the help: `whole number or null`."""
    return " or ".join(accepts(field))


def _kinds(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if origin is Literal:
        return [f'"{choice}"' for choice in get_args(annotation)]
    return [_NAMES[origin or annotation]]
