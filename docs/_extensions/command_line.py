"""The directive `command-line`: every command of `progscale` with its options, from the parser itself.

The extension of this kind reads descriptions and examples as markup, which ours are not.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from progscale.cli import build_parser


class CommandLine(Directive):
    """A section for each command."""

    def run(self) -> Sequence[nodes.Node]:
        """The nodes of the page."""
        return [_section(name, parser) for name, parser in _commands(build_parser())]


def _commands(parser: argparse.ArgumentParser, above: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Commands and commands of commands, by full name, in the order of the help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                below = list(_commands(inner, f"{above}{name} "))
                yield from below or [(f"{above}{name}", inner)]


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.Node:
    anchor = "command-" + name.replace(" ", "-")
    section = nodes.section(ids=[anchor], names=[anchor])
    section += nodes.title("", "", nodes.literal(text=f"progscale {name}"))
    section += nodes.paragraph(text=" ".join((parser.description or "").split()))
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    section += nodes.literal_block(usage, usage, language="text")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            section += nodes.paragraph("", "", nodes.strong(text=group.title or ""))
        listing = nodes.definition_list(classes=["options"])
        for action in actions:
            formatter = parser._get_formatter()
            invocation = formatter._format_action_invocation(action)
            text = formatter._expand_help(action) if action.help else ""
            term = nodes.term("", "", nodes.literal(text=invocation))
            listing += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=text)))
        section += listing
    if parser.epilog:
        examples = inspect.cleandoc(parser.epilog).removeprefix("examples:").strip("\n")
        examples = inspect.cleandoc(examples)
        section += nodes.paragraph("", "", nodes.strong(text="examples"))
        section += nodes.literal_block(examples, examples, language="bash")
    return section


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}
