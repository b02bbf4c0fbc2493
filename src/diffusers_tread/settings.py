# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Compares settings with those stored in a folder's JSON file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import read_object


def check_settings(path: Path, settings: dict[str, Any], *, free: Iterable[str] = ()) -> None:
    """Compares settings with those stored in a folder's file.

    Raises:
        ValueError: Settings differ, which the message lists; or the file is damaged.
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
    """The differences between two settings, one text each; nested settings have dotted names.

    At most ten are listed; further ones are counted.
    """
    before, now = _flatten(before), _flatten(json.loads(json.dumps(now)))
    changes = [
        f"{key}: {_short(before.get(key))} there, {_short(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.partition(".")[0] not in set(free)
    ]
    return changes if len(changes) <= 10 else [*changes[:10], f"{len(changes) - 10} more"]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}, so that each difference has one name."""
    flat = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
