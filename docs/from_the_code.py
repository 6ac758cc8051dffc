"""Directives whose content comes from the code, so that it cannot go stale.

`keys` makes the table of a settings model's keys; the meanings are written in it, and a key without a meaning or a
meaning without a key is a warning, which ends the build. `command` shows what a cheap command prints;
`architectures` lists what can be cut.
"""

import importlib
import os
import re
import types
import typing
from unittest import mock

import annotated_types as bounds
import typer
import yaml
from docutils import nodes
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from typer.testing import CliRunner

from capgap.anatomy import Grouped, Q, known_tables
from capgap.recipe import FamilyPick, Mixed, Section, parse_count, parse_scale
from capgap.study.spec import parse_budget

log = logging.getLogger(__name__)
_BASIC = {str: "text", bool: "true or false", int: "whole number", float: "number"}
_BOUNDS = ((bounds.Gt, "gt", "above"), (bounds.Ge, "ge", "at least"), (bounds.Lt, "lt", "below"))


def type_text(annotation: typing.Any, metadata: typing.Sequence[typing.Any] = ()) -> str:
    """A type as a reader of recipes would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0], [*arguments[1:], *metadata])
    parsers = {getattr(each, "func", None) for each in metadata}
    if parse_scale in parsers:
        text = "count or fraction"
    elif parse_count in parsers:
        text = "count"
    elif parse_budget in parsers:
        text = "count or tokens per parameter"
    elif origin is dict:
        text = "keys and values"
    elif origin is typing.Literal:
        text = " or ".join(f"`{value}`" for value in arguments)
    elif origin in (typing.Union, types.UnionType):
        text = " or ".join(dict.fromkeys(type_text(each) for each in arguments if each is not type(None)))
    elif origin in (list, tuple):
        how_many = "list of" if origin is list else str(len(arguments))
        text = f"{how_many} {_plural(type_text(arguments[0]))}"
    elif annotation in (FamilyPick, Mixed):
        text = f"`{{{', '.join(f'{key}: ...' for key in annotation.model_fields)}}}`"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        text = f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    else:
        text = _BASIC[annotation]
    return ", ".join([text, *_bounds(metadata)])


def _plural(text: str) -> str:
    return re.sub(r"^(whole number|number|text)", r"\1s", text)


def _bounds(metadata: typing.Sequence[typing.Any]) -> list[str]:
    found = []
    for each in metadata:
        found += _bounds(each.metadata) if isinstance(each, FieldInfo) else []
        found += [f"{words} {getattr(each, name):g}" for kind, name, words in _BOUNDS if isinstance(each, kind)]
        found += [f"at most {each.le:g}"] if isinstance(each, bounds.Le) else []
    return found


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    default = field.default
    assert default is not PydanticUndefined
    if default is None or default == {}:
        return "none"
    if isinstance(default, list) and default and isinstance(default[0], Section):
        return "one with its own defaults"
    if isinstance(default, Section):
        return "its own defaults"
    if isinstance(default, str):
        return f"`{default}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple | list):
        return f"`{list(default)}`"
    return f"{default:,}" if isinstance(default, int) else f"{default:g}"


class Keys(SphinxDirective):
    """The table of a model's keys. Argument: its dotted name; content: YAML, the meaning of each key."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        fields = getattr(importlib.import_module(module), name).model_fields
        fields = {field.alias or key: field for key, field in fields.items()}
        meanings = yaml.safe_load("\n".join(self.content)) or {}
        for key in fields.keys() ^ meanings.keys():
            what = "has no meaning here" if key in fields else "is no key of it"
            log.warning("%s: %s %s", self.arguments[0], key, what, location=self.get_location())
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in fields.items():
            row = [f"`{key}`", type_text(field.annotation, field.metadata), default_text(field)]
            lines.append(f"| {' | '.join([*row, str(meanings.get(key, ''))])} |")
        return self.parse_text_to_nodes("\n".join(lines))


class Command(SphinxDirective):
    """What a capgap command prints; it runs in the repository's root. Argument: its words."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        from capgap.cli import commands

        app = typer.Typer()
        commands.register(app)
        words = self.arguments[0].split()
        before = os.getcwd()  # noqa: PTH109
        os.chdir(os.path.dirname(self.env.srcdir))  # noqa: PTH120
        try:
            with mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
                done = CliRunner().invoke(app, words[1:])
        finally:
            os.chdir(before)
        if done.exit_code != 0:
            log.warning("%s: %s", self.arguments[0], done.exception or done.output, location=self.get_location())
        shown = "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())
        return [
            nodes.literal_block(self.arguments[0], self.arguments[0], language="console"),
            nodes.literal_block(shown, shown, language="text"),
        ]


class Architectures(SphinxDirective):
    """The table of the architectures that come with capgap."""

    def run(self) -> list[nodes.Node]:
        lines = ["| model type | queries, keys, values | heads | cut |", "|---|---|---|---|"]
        for table in known_tables():
            layouts = [
                axis for row in table.layer for axis in row.axes if not isinstance(axis, str) and Q in axis.parts
            ]
            layout = "three weights"
            if layouts:
                layout = "one weight, by group" if isinstance(layouts[0], Grouped) else "one weight, stacked"
            bound = table.fields.head_dim is None
            cuts = ["layers", "hidden size with heads" if bound else "hidden size, heads", "neurons"]
            cuts += ["experts"] if table.fields.experts else []
            names = ", ".join(f"`{name}`" for name in table.model_types)
            lines.append(f"| {names} | {layout} | {'bound' if bound else 'free'} | {', '.join(cuts)} |")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app):
    app.add_directive("architectures", Architectures)
    app.add_directive("keys", Keys)
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
