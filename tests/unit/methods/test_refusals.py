"""What is refused stands in the docs, with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from progscale.errors import ModelError
from progscale.methods import METHODS
from tests.harness.cases import ENGINES
from tests.harness.refused import by_engine, by_family
from tests.tiny import FAMILY_NAMES, SHARED_BLOCKS, method_for, tiny_model

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"
ROWS = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", METHODS.names())
def test_each_refusal_is_listed(name: str) -> None:
    engines = {engine.removesuffix("-offload") for engine in ENGINES if by_engine(name, engine) is not None}
    families = {family for family in (*FAMILY_NAMES, *SHARED_BLOCKS) if by_family(name, family) is not None}
    rows = [row for row in ROWS if f"`{name}`" in row]
    for engine in engines:
        assert any(f"ZeRO-{engine[-1]}" in row for row in rows), (name, engine)
    for family in families:
        assert any(family in row for row in rows), (name, family)


@pytest.mark.parametrize("name", ["adapter", "lora", "qlora"])
def test_a_family_that_names_no_layers(name: str) -> None:
    """`generic` cannot know which layers a method changes; the message says how to name them."""
    with pytest.raises(ModelError, match=rf"method '{name}': family 'generic' does not say .* --set '?method\.options\."):
        method_for("generic", name).prepare(tiny_model("bert"))
    named = {"adapter": {"sublayers": ["attention.output.dropout"]}}.get(name, {"targets": ["query"]})
    method_for("generic", name, **named).prepare(tiny_model("bert"))
