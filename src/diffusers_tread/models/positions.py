# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Where a token of an image is."""

import torch


def sincos_positions(
    dim: int, height: int, width: int, *, base: int | None = None, device: "torch.device | str | None" = None
) -> torch.Tensor:
    """Fixed 2D sine-cosine positions (arXiv 2111.06377): half the channels for the column, half for the row.

    The order of the halves is that of MAE, DiT and diffusers, so that DiT's weights fit.

    Args:
        dim: D, divisible by 4.
        height: Rows of tokens.
        width: Columns of tokens.
        base: If given, rows and columns are scaled to [0, base), the range of the training grid.
        device: Where to make them.

    Returns:
        [height * width, D] float32, tokens in row-major order.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32) * (1.0 if base is None else base / height)
    columns = torch.arange(width, device=device, dtype=torch.float32) * (1.0 if base is None else base / width)
    omega = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))  # D/4

    rows, columns = rows.unsqueeze(1) * omega, columns.unsqueeze(1) * omega  # h D/4, w D/4
    rows = torch.cat([rows.sin(), rows.cos()], dim=1).unsqueeze(1).expand(-1, width, -1)  # h w D/2
    columns = torch.cat([columns.sin(), columns.cos()], dim=1).unsqueeze(0).expand(height, -1, -1)  # h w D/2
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
