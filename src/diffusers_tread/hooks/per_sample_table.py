# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for unbatched rotary tables that gives each sample its own rows.

Shapes: B batch, K kept tokens, D table width.
"""

from typing import Any

import torch


class PerSampleTable:
    """Behaves like a table [K, ...] without a batch axis, but holds one table per sample.

    Rotary code takes a table [N, D], adds axes to broadcast it over batch and heads, and multiplies. When the batch
    axis is added, by `table[None, ...]`, `unsqueeze(0)`, `view(1, ...)` or by broadcasting in a product with a
    batched tensor, the result is a plain tensor with batch axis B. Anything not defined here fails with a TypeError
    or AttributeError, so samples cannot silently be paired with tokens.

    Args:
        rows: [B, K, ...], for each sample the table rows of its kept tokens.
    """

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape[1:]

    @property
    def ndim(self) -> int:
        return self.rows.ndim - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def real(self) -> "PerSampleTable":
        return PerSampleTable(self.rows.real)

    @property
    def imag(self) -> "PerSampleTable":
        return PerSampleTable(self.rows.imag)

    def size(self, dim: int | None = None) -> "torch.Size | int":
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def is_complex(self) -> bool:
        return self.rows.is_complex()

    def to(self, *args: Any, **kwargs: Any) -> "PerSampleTable":
        return PerSampleTable(self.rows.to(*args, **kwargs))

    def float(self) -> "PerSampleTable":
        return PerSampleTable(self.rows.float())

    def cos(self) -> "PerSampleTable":
        return PerSampleTable(self.rows.cos())

    def sin(self) -> "PerSampleTable":
        return PerSampleTable(self.rows.sin())

    def contiguous(self) -> "PerSampleTable":
        return PerSampleTable(self.rows.contiguous())

    def unsqueeze(self, dim: int) -> "torch.Tensor | PerSampleTable":
        dim = dim + self.ndim + 1 if dim < 0 else dim
        return self.rows if dim == 0 else PerSampleTable(self.rows.unsqueeze(dim + 1))

    def chunk(self, chunks: int, dim: int = 0) -> "tuple[PerSampleTable, ...]":
        dim = dim + self.ndim if dim < 0 else dim
        return tuple(PerSampleTable(part) for part in self.rows.chunk(chunks, dim + 1))

    def view(self, *shape: int) -> torch.Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if shape[0] != 1:
            raise TypeError(f"A per-sample table can only be viewed with a leading batch axis of 1, got {shape}.")
        return self.rows.reshape(self.rows.shape[0], *shape[1:])

    reshape = view

    def __getitem__(self, index: Any) -> "torch.Tensor | PerSampleTable":
        index = index if isinstance(index, tuple) else (index,)
        if index and index[0] is None:  # adds the batch axis, which `rows` already has
            return self.rows[(slice(None), *index[1:])]
        return PerSampleTable(self.rows[(slice(None), *index)])

    def __mul__(self, other: torch.Tensor) -> torch.Tensor:
        if not isinstance(other, torch.Tensor) or other.ndim <= self.ndim:
            return NotImplemented
        missing = (1,) * (other.ndim - self.rows.ndim)
        return self.rows.reshape(self.rows.shape[0], *missing, *self.shape) * other

    __rmul__ = __mul__

    def __len__(self) -> int:
        return self.shape[0]
