# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A denoiser together with the networks that its loss terms train with it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .base import LossTerm


class GridHead(torch.nn.Module):
    """A head that uses a token's neighbours, called as `head(tokens, columns)`.

    The tokens are [B, rows * columns, D], row by row; in a route of rows they are the kept rows.
    """


class DenoiserWithHeads(torch.nn.Module):
    """A denoiser and its terms' `heads` in one module, so that Accelerate wraps, clips and saves all of it.

    The heads are called in its forward, as DDP and FSDP2 require, and in every forward, because DDP waits for all
    gradients. The denoiser's parameters come first, and only the denoiser is exported.

    Args:
        denoiser: A denoiser that returns tokens after blocks, `forward(..., hidden_states_at=...)`. Not modified.
        terms: The terms of its loss.

    Raises:
        ValueError: Two terms have a head at the same block.
    """

    def __init__(self, denoiser: torch.nn.Module, terms: Sequence[LossTerm]):
        super().__init__()
        heads = [(str(block), head) for term in terms for block, head in term.heads.items()]
        if len(dict(heads)) < len(heads):
            raise ValueError(f"Expected one head at a block, got heads at {[int(block) for block, _ in heads]}.")
        self.denoiser, self.heads = denoiser, torch.nn.ModuleDict(heads)
        self._no_split_modules = getattr(denoiser, "_no_split_modules", None)  # FSDP's units

    @property
    def config(self) -> Any:
        """The denoiser's config."""
        return self.denoiser.config

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, *, hidden_states_at: Iterable[int] = (), **options
    ) -> Any:
        """The denoiser's output, with `projected_states`.

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B].
            hidden_states_at: Further blocks whose tokens to return.
            **options: The denoiser's other arguments.
        """
        wanted = sorted({*hidden_states_at, *map(int, self.heads)})
        output = self.denoiser(hidden_states, timestep, hidden_states_at=wanted, **options)
        columns, projected = hidden_states.shape[-1] // getattr(self.config, "patch_size", 1), {}
        for block, head in self.heads.items():
            grid = {"columns": columns} if isinstance(head, GridHead) else {}
            projected[int(block)] = head(output.hidden_states[int(block)], **grid)
        output["projected_states"] = projected  # as an item, which also sets the attribute: copies copy the items
        return output
