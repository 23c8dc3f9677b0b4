"""The spec's own documentation: the line of meaning under each field, read from the source of `mal.spec.schema`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from mal.spec.schema import Spec


@functools.cache
def _own_meanings(cls: type) -> dict[str, str]:
    """Field name -> its line, of the fields that ``cls`` itself declares."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    found = {}
    for declaration, text in itertools.pairwise(body):
        if isinstance(declaration, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = typing.cast(ast.Name, declaration.target).id
            found[name] = typing.cast(str, ast.literal_eval(text.value))
    return found


def meanings(cls: type) -> dict[str, str]:
    """Field name -> its line of meaning, inherited fields included."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    found: dict[str, str] = {}
    for base in bases:
        found |= _own_meanings(base)
    return found


def table() -> Iterator[tuple[str, str, str, str]]:
    """Rows of the spec table of the README: dotted key, type, default, meaning."""
    yield from _rows(Spec, "")


def _rows(cls: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints, lines = typing.get_type_hints(cls), meanings(cls)
    for spec_field in dataclasses.fields(cls):
        hint = hints[spec_field.name]
        if dataclasses.is_dataclass(hint):
            yield from _rows(hint, f"{prefix}{spec_field.name}.")
        else:
            default = _shown(spec_field.default)
            yield f"{prefix}{spec_field.name}", _type(hint, spec_field.metadata), default, lines[spec_field.name]


def _type(hint: Any, bounds: Any) -> str:
    if "choices" in bounds:
        of = "list of " if typing.get_origin(hint) is tuple else ""
        return of + " \\| ".join(map(str, bounds["choices"]))
    names = {bool: "bool", int: "int", float: "float", str: "text"}
    if typing.get_origin(hint) is tuple:
        return f"list of {names[typing.get_args(hint)[0]]}"
    return names.get(hint) or _type(next(a for a in typing.get_args(hint) if a is not type(None)), {})


def _shown(default: Any) -> str:
    if default is None:
        return "-"
    if isinstance(default, tuple):
        return "[" + ", ".join(map(_shown, default)) + "]"
    return f"{default:g}" if isinstance(default, float) else str(default)


def markdown() -> str:
    """The spec table as Markdown."""
    head = "| key | type | default | meaning |\n|---|---|---|---|\n"
    return head + "\n".join(f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in table())
