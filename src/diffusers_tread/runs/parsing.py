# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Builds config dataclasses from command-line flags, JSON config files and recipes."""

import argparse
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar


T = TypeVar("T")


def parse_config(
    kind: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    recipe_settings: Callable[[str], dict[str, Any]] | None = None,
    default_config: str | Path | None = None,
) -> T:
    """Parses a command line into a config dataclass.

    There is a flag for each field, and `--help` shows the fields' docstrings. Flags override `--config FILE`, which
    overrides `--recipe NAME`, which overrides the defaults.

    Args:
        kind: A dataclass with a docstring for each field.
        argv: The command line; None for the one of this process.
        description: Beginning of the text of `--help`.
        recipe_settings: Returns the settings of a recipe by its name; None if there are no recipes.
        default_config: Config used without --config, --recipe and --data: a file, or JSON text.

    Raises:
        ValueError: From `config_flags`, `recipe_settings` or the dataclass.
        SystemExit: For an unknown flag or a value of the wrong type, after a message; for `--help`.
    """
    import tyro  # a dependency of the scripts, not of the package

    # Config file and recipe, as flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--recipe")
    given, rest = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if given.config is given.recipe is None and not any(word.partition("=")[0] == "--data" for word in rest):
        given.config = default_config and str(default_config)
    flags, known = [], [field.name for field in dataclasses.fields(kind)]
    if given.recipe is not None:
        if recipe_settings is None:
            raise ValueError("Expected no --recipe, of which this script has none.")
        flags += config_flags(json.dumps(recipe_settings(given.recipe)), known=known)
    if given.config is not None:
        flags += config_flags(given.config, known=known)
    description = f"{description} --config FILE gives values for any of these flags as JSON"
    description += ", --recipe NAME those of a recipe." if recipe_settings else "."

    # Run the checks of the dataclass after tyro, which would end the process at their errors.
    unchecked = type(kind.__name__, (kind,), {"__post_init__": lambda self: None})
    # For a switch that may also be None, tyro wants an explicit value.
    unset = [field.name for field in dataclasses.fields(kind) if field.type == (bool | None)]
    switches = {f"--{name}": f"--{name}=True" for name in unset} | {
        f"--no-{name}": f"--{name}=False" for name in unset
    }
    pairs = pairwise([*flags, *rest, ""])
    words = [switches.get(word, word) if after not in ("True", "False", "None") else word for word, after in pairs]
    values = tyro.cli(unchecked, args=words, description=description, use_underscores=True)
    return kind(**vars(values))


def read_json(source: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        source: The JSON text, the path of a JSON file, or a model folder with a `config.json`.

    Raises:
        ValueError: The file does not exist or does not hold a JSON object.
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
    """Converts a JSON config to command-line flags, so that both are parsed by the same rules.

    Args:
        path: The JSON file or text. Objects and lists become JSON texts, true and false become `--name` and
            `--no-name`, and null is left out.
        known: Names that may occur.

    Raises:
        ValueError: As for `read_json`; a name is unknown.

    Example:
        >>> from diffusers_tread.runs.parsing import config_flags
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


def check_at_least(config: Any, fewest: int, *names: str) -> None:
    """Raises ValueError if a field of a config is below a minimum. Fields that are None are not checked."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < fewest:
            raise ValueError(f"Expected --{name} >= {fewest}, got {value}.")


def check_types(config: Any, *names: str) -> None:
    """Raises ValueError for fields of a config with values of other types than theirs, or that are not finite."""
    hints = typing.get_type_hints(type(config))
    for name in names:
        if not _fits(value := getattr(config, name), hints[name]):
            told = str(hints[name]).removeprefix("typing.").removeprefix("<class ").removesuffix(">")
            raise ValueError(f"Expected --{name} as {told}, numbers finite, got {value!r}.")


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
