# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Rows of the token grid as what a route keeps: they are chosen as if each were one token.

Shapes: B batch, N tokens in raster order, F frames (1 for images), h rows, w columns, h' kept rows, D width.
"""

import math

import torch


def check_grid(grid_size: tuple[int, ...] | None, num_tokens: int) -> tuple[int, int, int]:
    """(F, h, w) of `num_tokens` tokens, from (h, w) or (F, h, w).

    Raises:
        ValueError: There is no grid, or one of another number of tokens.
    """
    frames, height, width = (1, 0, 0) if grid_size is None else (1, *grid_size)[-3:]
    if frames * height * width != num_tokens:
        raise ValueError(
            f"Expected the grid of the {num_tokens} tokens for a route of rows, got grid_size={grid_size}. Give "
            "(rows, columns), or use TokenRoute(unit='token')."
        )
    return frames, height, width


def rows_as_tokens(tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[..., N, D] to [..., h, F * w * D]: each row, through all frames, as one token."""
    return tokens.unflatten(-2, grid).movedim(-4, -3).flatten(-3)


def tokens_of_rows(row_ids: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[B, h'] ids of rows, sorted, to the sorted ids of their tokens, [B, F * h' * w]."""
    frames, height, width = grid
    frame_rows = torch.arange(frames, device=row_ids.device).unsqueeze(1) * height + row_ids.unsqueeze(1)  # B F h'
    return (frame_rows.unsqueeze(-1) * width + torch.arange(width, device=row_ids.device)).flatten(1)


def count_forced(force_keep: torch.Tensor) -> dict[int, int]:
    """The most rows of a sample that have a forced token, by the width that rows may have; of width 1: tokens.

    Args:
        force_keep: [N] or [B, N] bool.
    """
    mask = force_keep.cpu()  # waits for the device once
    num_tokens = mask.shape[-1]
    narrow = [width for width in range(1, math.isqrt(num_tokens) + 1) if num_tokens % width == 0]
    widths = {*narrow, *(num_tokens // width for width in narrow)}
    return {width: int(mask.unflatten(-1, (-1, width)).any(dim=-1).sum(dim=-1).max()) for width in widths}
