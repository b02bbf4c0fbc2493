# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A spec of other people's blocks in one line, and here the blocks and their model."""

import torch
import torch.nn as nn

from diffusers_tread import BlockSpec, register_block_spec


class TurningBlock(nn.Module):
    """Turns each token by the angles of its position."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        turned = self.norm(x) * angles.cos() + x.mean(dim=1, keepdim=True) * angles.sin()
        return x + self.mlp(turned)


class TurningModel(nn.Module):
    def __init__(self, dim: int = 8, num_layers: int = 8, num_tokens: int = 16):
        super().__init__()
        self.blocks = nn.ModuleList(TurningBlock(dim) for _ in range(num_layers))
        self.register_buffer("angles", torch.linspace(0, 3, num_tokens * dim).view(num_tokens, dim))  # N D

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            tokens = block(tokens, self.angles)
        return tokens


register_block_spec("TurningBlock", BlockSpec(hidden="x", tokens={"angles": 0}))
