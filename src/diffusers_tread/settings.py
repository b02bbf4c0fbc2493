# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Settings that a folder keeps in a JSON file, and how others differ from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import read_object


def check_settings(path: Path, settings: dict[str, Any], *, free: Iterable[str] = ()) -> None:
    """Compares settings with those that a folder's file keeps.

    Raises:
        ValueError: With each setting that differs; the file is damaged.
    """
    try:
        before = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error} Nobody can tell what {path.parent} was made with: use another folder.") from error
    if changes := list_changes(before, settings, free=free):
        raise ValueError(
            f"Expected a new folder or one of the same settings, got {path.parent}, which was made with other "
            f"settings ({'; '.join(changes)}). Use another folder, or delete this one."
        )


def list_changes(before: dict[str, Any], now: dict[str, Any], *, free: Iterable[str] = ()) -> list[str]:
    """What differs between two settings, each as a text; of nested ones the innermost names.

    Ten are told, the others counted.
    """
    before, now = _flatten(before), _flatten(json.loads(json.dumps(now)))
    changes = [
        f"{key}: {_short(before.get(key))} there, {_short(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.partition(".")[0] not in set(free)
    ]
    return changes if len(changes) <= 10 else [*changes[:10], f"{len(changes) - 10} more"]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}, so that a difference has a name."""
    flat = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
