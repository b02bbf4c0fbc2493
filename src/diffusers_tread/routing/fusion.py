# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Joins what all tokens were before a route with what the route made of the kept ones (SPRINT, arXiv 2510.21986).

Shapes: B batch, N tokens, K kept tokens, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn

from .ops import put_tokens
from .route import TokenRoute


class RouteFusion(nn.Module):
    """The end of a route with `rejoin="fuse"`: Linear(2 D -> D) of two states of each token, side by side.

    The one is the token in front of the route, the other what the route's blocks made of it, or a learned mask vector
    where it was routed away.

    Args:
        dim: D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.mask = nn.Parameter(torch.empty(dim))
        self.proj = nn.Linear(2 * dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The mean of both states, and a mask vector as small as class embeddings are.

        So at first, when DiT's blocks are the identity, a dense model is what it is without fusion, and a routed token
        goes on in the direction of its state before the route. The paper's initialisation is not known here.
        """
        half = torch.eye(len(self.mask), dtype=self.proj.weight.dtype, device=self.proj.weight.device) / 2
        self.proj.weight.copy_(torch.cat([half, half], dim=1))
        nn.init.zeros_(self.proj.bias)
        nn.init.normal_(self.mask, std=0.02)

    def forward(
        self,
        before: torch.Tensor,
        kept: torch.Tensor | None,
        kept_token_ids: torch.Tensor | None = None,
        is_dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            before: [B, N, D], in front of the route's first block.
            kept: After the route's last block: [B, K, D], or [B, N, D] where no token was routed away; None where
                its blocks were not run.
            kept_token_ids: [B, K] int64, of `kept`; None for all tokens.
            is_dropped: [B] bool, samples of which the mask vector stands for all tokens; None for none of them.

        Returns:
            [B, N, D] in the dtype of `before`.
        """
        mask = self.mask.to(before.dtype).expand_as(before)  # B N D
        if kept is None:
            middle = mask
        elif kept_token_ids is None:
            middle = kept.to(before.dtype)
        else:
            middle = put_tokens(mask, kept_token_ids, kept)
        if is_dropped is not None:
            middle = torch.where(is_dropped[:, None, None], mask, middle)
        fused = self.proj(torch.cat([before, middle], dim=2)).to(before.dtype)

        # DDP waits for a gradient of each parameter, also in a dense step.
        uses_mask = kept is None or kept_token_ids is not None or is_dropped is not None
        return fused if uses_mask or not torch.is_grad_enabled() else fused + 0.0 * mask


def make_fusions(routes: Sequence[TokenRoute], dim: int) -> nn.ModuleDict:
    """A `RouteFusion` for each route that wants one, by the route's index."""
    # Not in a list, which caches and offloading of diffusers would take for one of blocks.
    return nn.ModuleDict(
        {str(index): RouteFusion(dim) for index, route in enumerate(routes) if route.rejoin == "fuse"}
    )
