# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Escapes foreign text for Markdown: names of classes, data sets and files may contain any character."""

import html
import re
from typing import Any


def as_text(value: Any) -> str:
    """Escapes the special characters of HTML and Markdown, and joins lines to one."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def as_code(value: Any) -> str:
    """Makes a name or path safe between backticks, or between quotes in a code block."""
    return re.sub(r"[^\w ./:@+=,-]", "-", " ".join(str(value).split()))


def table_row(*cells: Any) -> str:
    """A table row with escaped cells."""
    return f"| {' | '.join(map(as_text, cells))} |"
