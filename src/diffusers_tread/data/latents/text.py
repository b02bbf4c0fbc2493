# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Captions encoded by text encoders, stored with latents.

A caption is encoded to named arrays [L, ...] by `PromptEncoder.encode`. L depends on the caption, such as its number
of tokens; the rest of the shape is the same for all captions. A shard stores the values as little-endian bytes, as in
safetensors: the array "0" of the caption column "long" is in its column "long.0". They are not stored as lists of
numbers, because the shuffle of a stream would copy these one by one. The arrays of the empty caption, which replaces
some captions in training, are in `text_empty.safetensors`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...settings import list_changes


EMPTY = "text_empty.safetensors"
DTYPES = ("float16", "bfloat16", "float32", "int64", "int32", "bool")
MAX_VALUES = 2**31 - 1  # values in a list of Arrow, and in one row (of L) of an array


@dataclass(frozen=True, kw_only=True)
class StoredText:
    """Describes the text encoders of a folder of latents and the stored arrays.

    Raises:
        ValueError: A dtype does not exist, a shape is not possible, or a field has the wrong type.
    """

    encoder: dict[str, Any]
    """`PromptEncoder.identity()`, because the arrays only fit a pipeline with the same encoders."""
    arrays: dict[str, dict[str, Any]]
    """`dtype` and `shape` of each array; the first size is None, because it depends on the caption."""
    empty: dict[str, Any]
    """`size` in bytes and `sha256` of the file with the empty caption."""

    def __post_init__(self):
        if not isinstance(self.encoder, dict) or not isinstance(self.arrays, dict) or not self.arrays:
            raise ValueError(f"Expected an encoder and the arrays it makes, got {self.encoder!r} and {self.arrays!r}.")
        for name, array in self.arrays.items():
            if not name.isidentifier() and not name.isdecimal():
                raise ValueError(f"Expected names of arrays such as 0 or prompt_embeds, got {name!r}.")
            if set(array) != {"dtype", "shape"} or array["dtype"] not in DTYPES:
                raise ValueError(f"Expected dtype {' or '.join(DTYPES)} and shape of {name}, got {array!r}.")
            first, *rest = array["shape"]
            if first is not None or not all(is_count(size) for size in rest) or math.prod(rest) > MAX_VALUES:
                raise ValueError(f"Expected shape [null, sizes >= 1 ...] of {name}, got {array['shape']!r}.")
        if set(self.empty) != {"size", "sha256"} or not is_count(self.empty["size"]):
            raise ValueError(f"Expected size and sha256 of {EMPTY}, got {self.empty!r}.")

    def columns(self, caption: str) -> dict[str, str]:
        """The shard's column for each array of a caption column, by the array's name."""
        return {name: f"{caption}.{name}" for name in self.arrays}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of an array."""
        return getattr(torch, self.arrays[name]["dtype"])

    def row_size(self, name: str) -> int:
        """Bytes of one of the L rows of an array."""
        return math.prod(self.arrays[name]["shape"][1:]) * self.dtype(name).itemsize

    def check(self, arrays: dict[str, torch.Tensor]) -> None:
        """Raises ValueError if names, dtypes or shapes of the arrays differ from the stored ones."""
        if (found := describe_arrays(arrays)) != self.arrays:
            raise ValueError(f"Expected arrays {self.arrays} of a caption, got {found}.")

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """Raises ValueError, naming the differences, unless this is the encoder that made the arrays."""
        if changes := list_changes(self.encoder, identity):
            raise ValueError(
                f"Expected the text encoder that the captions of these latents were encoded with, got another one "
                f"({'; '.join(changes)}). Name the same pipeline and max_sequence_length, or make the latents anew. "
                "For a run in float16 (--mixed_precision fp16) make them by --text_dtype float16: it rounds otherwise."
            )

    def load_empty(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """Loads the arrays of the empty caption.

        Raises:
            ValueError: The file is missing, has changed or holds something else.
        """
        import safetensors.torch

        path = Path(folder, EMPTY)
        try:
            content = path.read_bytes() if path.stat().st_size == self.empty["size"] else b""
            if hashlib.sha256(content).hexdigest() != self.empty["sha256"]:
                raise ValueError("its size or SHA-256 is another one")
            arrays = safetensors.torch.load(content)
            self.check(arrays)
        except Exception as error:  # safetensors raises errors of its own
            raise ValueError(
                f"Expected the empty caption's embedding as it was written in {path}, got something else ({error}). "
                "Fetch it again."
            ) from error
        return arrays


def describe_empty(encoder: dict[str, Any], arrays: dict[str, torch.Tensor]) -> tuple[StoredText, bytes]:
    """Makes the description of an encoder, from its arrays of the empty caption, and the content of the file `EMPTY`.

    Raises:
        ValueError: An array is a scalar or has a dtype that cannot be stored.
    """
    import safetensors.torch

    content = safetensors.torch.save({name: values.contiguous() for name, values in arrays.items()})
    empty = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return StoredText(encoder=encoder, arrays=describe_arrays(arrays), empty=empty), content


def describe_arrays(arrays: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """`dtype` and `shape` of arrays, see `StoredText`. Raises ValueError for a scalar."""
    if flat := [name for name, values in arrays.items() if values.ndim == 0]:
        raise ValueError(f"Expected arrays of captions with at least one size, got a number for {flat}.")
    return {
        name: {"dtype": str(values.dtype).removeprefix("torch."), "shape": [None, *values.shape[1:]]}
        for name, values in sorted(arrays.items())
    }


def to_bytes(values: torch.Tensor) -> bytes:
    """Converts a tensor to the bytes that a shard stores."""
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(content, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_bytes`: copies a buffer to a flat tensor."""
    values = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    # Convert to booleans instead of viewing the bytes, because a boolean's byte must be 0 or 1.
    return values.bool() if dtype == torch.bool else values.view(dtype)


def read_arrays(table, rows_captions: Sequence[str], text: StoredText) -> list[dict[str, torch.Tensor]]:
    """Copies the arrays of the records of a table.

    Args:
        table: `pyarrow.Table` of n records.
        rows_captions: The caption column to read for each record.
        text: Description of the folder's arrays.
    """
    records = []
    for row, caption in enumerate(rows_captions):
        arrays = {}
        for name, column in text.columns(caption).items():
            _, *rest = text.arrays[name]["shape"]
            content = table.column(column)[row].as_buffer()
            arrays[name] = from_bytes(content, text.dtype(name)).view(-1, *rest)
        records.append(arrays)
    return records


def is_count(value: Any) -> bool:
    """Whether a value read from JSON is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
