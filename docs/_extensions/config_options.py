"""The directive `config-options`: every key of a config, of the named sections or of all, from the schema itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from progscale.config.describe import Option, describe_schema


class ConfigOptions(Directive):
    """A definition for each option, with its accepted values and default."""

    optional_arguments = 20

    def run(self) -> Sequence[nodes.Node]:
        """The nodes of the page."""
        sections: dict[str, list[Option]] = {}
        for option in describe_schema():
            sections.setdefault(option.key.split(".")[0], []).append(option)
        wanted = self.arguments or [name for name, options in sections.items() if options[0].key != name]
        unknown = set(wanted) - set(sections)
        if unknown:
            raise self.error(f"config-options: unknown {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
        found: list[nodes.Node] = []
        for name in wanted:
            section = nodes.section(ids=[f"option-{name}"], names=[f"option-{name}"])
            section += nodes.title(text=name)
            self.state.document.note_explicit_target(section)
            section += _table(sections[name])
            found.append(section)
        return found


def _table(options: Sequence[Option]) -> nodes.Node:
    listing = nodes.definition_list(classes=["options"])
    for option in options:
        term = nodes.term(ids=[f"option-{option.key.replace('.', '-').replace('_', '-')}"])
        term += nodes.literal(text=option.key)
        term += nodes.inline(text=f"  {option.type}; by default ")
        term += nodes.literal(text=json.dumps(option.default, ensure_ascii=False))
        listing += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=option.description)))
    return listing


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-options", ConfigOptions)
    return {"parallel_read_safe": True}
