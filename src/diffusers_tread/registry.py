# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Adds entries to the tables of models, objectives, loss terms, guiders and metrics."""

from typing import Any


def add_entry(table: dict[str, Any], name: str, value: Any) -> None:
    """Adds an entry under a new name.

    Raises:
        ValueError: Another entry has this name.
    """
    if table.get(name, value) is not value:
        raise ValueError(f"Expected a new name for {value!r}, got {name!r}, the name of {table[name]!r}.")
    table[name] = value
