# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reads prompts from files and from columns of `datasets` repositories."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hub_errors import ADVICE, LOST
from .prompt_images import check_prompts


def read_prompts(path: str | Path, *, caption_column: str = "text") -> list[str]:
    """Reads the prompts of a file.

    Args:
        path: A .txt file with one prompt per line, or a .jsonl, .csv or .parquet file with one per row.
        caption_column: The column, or key, of the prompts in a file that is not .txt.

    Raises:
        ValueError: The file is missing, damaged or of another type, has no such column, or has rows without a prompt.
    """
    path = Path(path)
    readers = {".txt": _read_lines, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f"Expected a file of {list(readers)} with prompts, got {path}. Check the path.")
    try:
        rows = readers[path.suffix](path)
    except (OSError, ValueError) as error:  # a damaged .parquet is a ValueError too
        raise ValueError(f"Expected a whole {path.suffix} file with prompts, got {path} ({error}).") from error
    if path.suffix != ".txt":
        rows = _column(rows, caption_column, where=str(path))
    check_prompts(rows, where=str(path))
    return rows


def load_dataset_prompts(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    split: str = "train",
    caption_column: str = "text",
    cache_dir: str | None = None,
) -> list[str]:
    """Reads the prompts of a `datasets` repository; its other columns are not decoded.

    Args:
        dataset_name: Repository on the Hub, or a local folder that `datasets.load_dataset` reads.
        dataset_config_name: Configuration of the data set.
        split: Split to read, such as "validation" or "train[:5000]".
        caption_column: Column with the prompts.
        cache_dir: Cache folder of `datasets`.

    Raises:
        ValueError: The data set is not accessible, has no such column, or has rows without a prompt.
    """
    import datasets

    try:
        rows = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    except LOST as error:
        raise ValueError(
            f"Expected access to the data set {dataset_name}, got: {str(error).rstrip('.')}. {ADVICE}"
        ) from error
    _check_column(rows.column_names, caption_column, where=dataset_name)
    prompts = list(rows.select_columns([caption_column])[caption_column])
    check_prompts(prompts, where=f"column {caption_column!r} of {dataset_name}")
    return prompts


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").splitlines()


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in _read_lines(path)]
    if any(not isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _column(rows: list[dict[str, Any]], name: str, *, where: str) -> list[Any]:
    _check_column(list(rows[0]) if rows else [name], name, where=where)
    return [row.get(name) for row in rows]


def _check_column(names: Sequence[str], name: str, *, where: str) -> None:
    if name not in names:
        raise ValueError(f"Expected a caption column of {where}, {list(names)}, got {name!r}. Use one of them.")
