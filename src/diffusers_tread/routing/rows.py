# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Routes of rows: each row of the token grid is kept or routed as if it were one token.

Shapes: B batch, N tokens in raster order, F frames (1 for images), h rows, w columns, h' kept rows, D width.
"""

import math
from typing import Any

import torch


def check_grid(grid_size: tuple[int, ...] | None, num_tokens: int) -> tuple[int, int, int]:
    """(F, h, w) of `num_tokens` tokens, from (h, w) or (F, h, w).

    Raises:
        ValueError: There is no grid, or it does not have `num_tokens` tokens.
    """
    grid = (1, *grid_size)[-3:] if grid_size is not None else ()
    if len(grid) != 3 or math.prod(grid) != num_tokens:
        raise ValueError(
            f"Expected the grid of the {num_tokens} tokens for a route of rows, got grid_size={grid_size}. Give "
            "(rows, columns), or use TokenRoute(unit='token')."
        )
    return grid


def rows_as_tokens(tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[..., N, D] to [..., h, F * w * D]: each row, through all frames, as one token."""
    return tokens.unflatten(-2, grid).movedim(-4, -3).flatten(-3)


def tokens_of_rows(row_ids: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[B, h'] ids of rows, sorted, to the sorted ids of their tokens, [B, F * h' * w]."""
    frames, height, width = grid
    frame_rows = torch.arange(frames, device=row_ids.device).unsqueeze(1) * height + row_ids.unsqueeze(1)  # B F h'
    return (frame_rows.unsqueeze(-1) * width + torch.arange(width, device=row_ids.device)).flatten(1)


def count_forced(force_keep: torch.Tensor) -> dict[tuple[int, int], int]:
    """The largest number of rows with a forced token in a sample, by (frames, width) of each possible grid.

    For (1, 1) this is the number of forced tokens.

    Args:
        force_keep: [N] or [B, N] bool.
    """
    mask: Any = force_keep.reshape(-1, force_keep.shape[-1]).cpu().numpy()  # B N, waits for the device once
    counts = {}
    for width in _divisors(mask.shape[1]):
        rows = mask.reshape(len(mask), -1, width).any(axis=2)  # B F*h
        for frames in _divisors(rows.shape[1]):
            of_all_frames = rows.reshape(len(mask), frames, -1).any(axis=1)  # B h
            counts[frames, width] = int(of_all_frames.sum(axis=1).max())
    return counts


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
