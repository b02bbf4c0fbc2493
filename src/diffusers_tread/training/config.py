# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""JSON configs for command-line scripts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(source: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        source: The text itself, a file with it, or a model folder with a `config.json`.

    Raises:
        ValueError: No such file, no JSON, or no object.
    """
    is_text = source.lstrip().startswith("{")
    try:
        if not is_text:
            path = Path(source)
            source = (path / "config.json" if path.is_dir() else path).read_text()
        content = json.loads(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a JSON object or a file with one, got {source!r} ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object, got {type(content).__name__} in {source!r}.")
    return content


def config_flags(path: str, *, known: Iterable[str]) -> list[str]:
    """A JSON config as command-line flags, to be put in front of the real ones, so that the same rules read both.

    Args:
        path: The file. Objects and lists become JSON texts, true and false `--name` and `--no-name`; null is left out.
        known: Names that may occur.

    Raises:
        ValueError: As `read_json`; an unknown name.

    Example:
        >>> from diffusers_tread.training.config import config_flags
        >>> config_flags('{"learning_rate": 0.005, "use_ema": true}', known=["learning_rate", "use_ema"])
        ['--learning_rate=0.005', '--use_ema']
    """
    values = read_json(path)
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"Expected the names of flags in {path}, got {unknown}. `--help` lists the flags.")
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}")
    return flags
