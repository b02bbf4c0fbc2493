# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Text of others in Markdown, as text: names of classes, data sets and files may hold anything."""

import html
import re
from typing import Any


def as_text(value: Any) -> str:
    """Escapes HTML and what Markdown has a use for, in one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def as_code(value: Any) -> str:
    """For what stands between backticks, or between quotes in a block of code: names and paths, nothing else."""
    return re.sub(r"[^\w ./:@+=,-]", "-", " ".join(str(value).split()))


def table_row(*cells: Any) -> str:
    """A row of a table, whose cells are text."""
    return f"| {' | '.join(map(as_text, cells))} |"
