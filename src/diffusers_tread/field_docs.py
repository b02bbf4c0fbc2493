# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Shows the docstrings under a dataclass's fields in `help()`."""

import ast
import inspect
import textwrap
from typing import Any, TypeVar


T = TypeVar("T", bound=type)


def with_field_docs(cls: T) -> T:
    """Appends a section "Attributes:" to the docstring of a class, made of the docstrings under its fields.

    Python does not keep those, so they are read from the source the first time the docstring is used.

    Example:
        >>> from diffusers_tread import TokenRoute
        >>> "selection_ratio: Share of tokens routed" in TokenRoute.__doc__
        True
    """
    cls.__doc__ = _DocWithFields(cls)  # type: ignore[assignment]
    return cls


class _DocWithFields:
    """A descriptor in place of `__doc__`, which makes the text when it is read."""

    def __init__(self, cls: type):
        self.cls, self.text = cls, inspect.cleandoc(cls.__doc__ or "")

    def __get__(self, instance: Any, owner: type | None = None) -> str:
        try:
            definition = ast.parse(textwrap.dedent(inspect.getsource(self.cls))).body[0]
        except (OSError, TypeError):  # no source, as in a frozen application
            return self.text
        lines = [f"    {name}: {textwrap.indent(text, ' ' * 8).lstrip()}" for name, text in _fields(definition)]
        return "\n".join([self.text, "", "Attributes:", *lines, ""])


def _fields(definition: Any) -> list[tuple[str, str]]:
    """Name and docstring of each field that has one."""
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return [
        (field.target.id, inspect.cleandoc(below.value.value))
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    ]
