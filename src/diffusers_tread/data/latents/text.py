# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What text encoders make of captions, stored beside latents.

A caption becomes some named arrays [L, ...], as `PromptEncoder.encode` gives them; L is the caption's own, such as its
number of tokens, and the rest of the shape that of all captions. A shard has their values as bytes, little-endian as
safetensors has them, for the caption column "long" and the array "0" in its column "long.0". As lists of numbers the
shuffle of a stream would copy them one by one. The arrays of the empty caption, which training puts in the place of
some, lie in `text_empty.safetensors`.
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
MAX_VALUES = 2**31 - 1  # of a list of Arrow, and of an array for each of its L


@dataclass(frozen=True, kw_only=True)
class StoredText:
    """What encoded the captions of a folder of latents, and what of that is stored.

    Raises:
        ValueError: A dtype that does not exist, a shape that cannot be, a field of another type.
    """

    encoder: dict[str, Any]
    """`PromptEncoder.identity()`: training with another encoder would not fit."""
    arrays: dict[str, dict[str, Any]]
    """For each array its `dtype` and its `shape`, whose first size is None: that of each caption."""
    empty: dict[str, Any]
    """`size` in bytes and `sha256` of the empty caption's file."""

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
        """For each array of a caption column the name of its column in a shard."""
        return {name: f"{caption}.{name}" for name in self.arrays}

    def dtype(self, name: str) -> torch.dtype:
        """Of an array."""
        return getattr(torch, self.arrays[name]["dtype"])

    def row_size(self, name: str) -> int:
        """Bytes of an array for each of its L."""
        return math.prod(self.arrays[name]["shape"][1:]) * self.dtype(name).itemsize

    def check(self, arrays: dict[str, torch.Tensor]) -> None:
        """Raises ValueError for arrays with other names, dtypes or shapes."""
        if (found := describe_arrays(arrays)) != self.arrays:
            raise ValueError(f"Expected arrays {self.arrays} of a caption, got {found}.")

    def check_encoder(self, identity: dict[str, Any]) -> None:
        """Raises ValueError, with what differs, for the identity of another encoder than made the arrays."""
        if changes := list_changes(self.encoder, identity):
            raise ValueError(
                f"Expected the text encoder that the captions of these latents were encoded with, got another one "
                f"({'; '.join(changes)}). Name the same pipeline and max_sequence_length, or make the latents anew. "
                "For a run in float16 (--mixed_precision fp16) make them by --text_dtype float16: it rounds otherwise."
            )

    def load_empty(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """The empty caption's arrays.

        Raises:
            ValueError: The file is missing, changed or holds something else.
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
    """What a folder says of an encoder that makes these arrays of the empty caption, and the content of `EMPTY`.

    Raises:
        ValueError: An array without sizes, or of a dtype that is not stored.
    """
    import safetensors.torch

    content = safetensors.torch.save({name: values.contiguous() for name, values in arrays.items()})
    empty = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return StoredText(encoder=encoder, arrays=describe_arrays(arrays), empty=empty), content


def describe_arrays(arrays: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """`dtype` and `shape` of arrays, see `StoredText`."""
    if flat := [name for name, values in arrays.items() if values.ndim == 0]:
        raise ValueError(f"Expected arrays of captions with at least one size, got a number for {flat}.")
    return {
        name: {"dtype": str(values.dtype).removeprefix("torch."), "shape": [None, *values.shape[1:]]}
        for name, values in sorted(arrays.items())
    }


def to_bytes(values: torch.Tensor) -> bytes:
    """The values of a tensor as a shard has them."""
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(content, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_bytes`, flat, of a buffer, which is copied."""
    values = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    # Not a view of bytes as booleans, which must be 0 or 1.
    return values.bool() if dtype == torch.bool else values.view(dtype)


def read_arrays(table, rows_captions: Sequence[str], text: StoredText) -> list[dict[str, torch.Tensor]]:
    """The arrays of the records of a table, copied.

    Args:
        table: `pyarrow.Table` of n records.
        rows_captions: For each the caption column.
        text: Of the folder.
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
