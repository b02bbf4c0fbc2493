# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Chooses the caption of a record: from one column, or at random from several in each epoch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..seeds import derive_seed


_ROWS = 1000  # rows read at once


@dataclass(frozen=True)
class CaptionColumns:
    """Columns with captions, and the probability of each.

    If there is no column "json.caption", this name means the key "caption" of the column "json", as in streams of
    webdataset tars. A column may hold a list of captions per image, which are equally likely.

    Args:
        names: The columns.
        probabilities: Probability of each column, in (0, 1]; they sum to 1.

    Raises:
        ValueError: There are no names, or a name occurs twice; a probability is out of range, or they do not sum to 1.
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self):
        names, shares = self.names, self.probabilities
        if not names or not all(names) or len(set(names)) < len(names) or len(shares) != len(names):
            raise ValueError(f"Expected caption columns, each once, got {list(names)} with {list(shares)}.")
        if not all(0 < share <= 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(
                f"Expected probabilities that sum to 1 for the caption columns {list(names)}, got {list(shares)}. "
                "Write one column as text, several as long:0.8,short:0.2."
            )

    def columns(self, features: Mapping[str, Any]) -> list[str]:
        """The columns of a data set that hold the captions.

        Args:
            features: The data set's features, by column.

        Raises:
            ValueError: A column, or a key in it, is missing; the message lists the existing ones.
        """
        columns = []
        for name in self.names:
            column, key = _split(name, features)
            keys = features.get(column)
            if column not in features or key and not (isinstance(keys, Mapping) and key in keys):
                inner = [f"{one}.{key}" for one, kind in features.items() if isinstance(kind, Mapping) for key in kind]
                raise ValueError(
                    f"Expected a caption column {name!r}, got {sorted([*features, *inner])}. "
                    "Name the right one with caption_column."
                )
            columns.append(column)
        return list(dict.fromkeys(columns))

    def check(self, source) -> None:
        """Checks that every row of a map-style data set has a caption, without reading the images.

        Args:
            source: A `datasets.Dataset`.

        Raises:
            ValueError: Rows have no caption; the message gives their number and the first one.
        """
        for name in self.names:
            column, key = _split(name, source.features)
            texts, empty = source.select_columns([column]), []
            for start in range(0, len(texts), _ROWS):
                values = texts[start : start + _ROWS][column]
                empty += [row for row, value in enumerate(values, start) if not _captions(value, key)]
            if empty:
                raise ValueError(
                    f"Expected text in every row of the caption column {name!r}, got none in {len(empty)} of "
                    f"{len(source)} rows, the first of them row {empty[0]}. Fill them or leave these rows out."
                )

    def choose(self, record: Mapping[str, Any], *, seed: int, epoch: int, place: int, rank: int = 0) -> str:
        """Draws a caption of a record. The result depends only on the arguments.

        Args:
            record: Values by column.
            seed: The run's seed.
            epoch: Epoch in which the record is used.
            place: Index of the record in the data set, or in the rank's part of a stream.
            rank: Rank of this process, for a stream.

        Raises:
            ValueError: The record has no caption.
        """
        draw = derive_seed(seed, "caption", rank, epoch, place)  # high bits choose the column, low bits the text
        name = self.names[sum(draw / 2**63 >= end for end in accumulate(self.probabilities[:-1]))]
        column, key = _split(name, record)
        captions = _captions(record[column], key)
        if not captions:
            raise ValueError(
                f"Expected text in the caption column {name!r}, got none in record {place} of epoch {epoch}. "
                "Fill it or leave the record out."
            )
        return captions[draw % len(captions)]


def parse_caption_columns(text: str) -> CaptionColumns:
    """Parses caption columns from the text of a flag.

    Args:
        text: One column, or several with probabilities.

    Raises:
        ValueError: See `CaptionColumns`; a probability is not a number.

    Example:
        >>> from diffusers_tread.data import parse_caption_columns
        >>> parse_caption_columns("long:0.8,short:0.2")
        CaptionColumns(names=('long', 'short'), probabilities=(0.8, 0.2))
    """
    parts = [part.strip().rpartition(":") if ":" in part else (part.strip(), ":", "1") for part in text.split(",")]
    try:
        shares = tuple(float(share) for _, _, share in parts)
    except ValueError:
        raise ValueError(
            f"Expected caption columns such as text, or long:0.8,short:0.2 with probabilities, got {text!r}."
        ) from None
    return CaptionColumns(tuple(name for name, _, _ in parts), shares)


def _split(name: str, columns: Mapping[str, Any]) -> tuple[str, str]:
    """Splits a name into the column and the key in it; the key is "" if there is none."""
    column, _, key = (name, "", "") if name in columns else name.partition(".")
    return column, key


def _captions(value: Any, key: str) -> list[str]:
    """The captions in a value of a column: all texts that are not blank."""
    value = (value or {}).get(key) if key else value
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]
