# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Joins the tokens from before a route with the route's output for the kept ones (SPRINT, arXiv 2510.21986).

Shapes: B batch, N tokens, K kept tokens, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn

from .ops import put_tokens
from .route import TokenRoute


class RouteFusion(nn.Module):
    """The end of a route with `rejoin="fuse"`: Linear(2 D -> D) on two concatenated states of each token.

    The first is the token before the route. The second is the route's output for it, or a learned mask vector if it
    was routed away.

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
        """Initialises the map to the mean of both states, and the mask vector with the std of class embeddings (0.02).

        DiT's blocks start as the identity, so a dense model starts as if it had no fusion, and a routed token keeps
        the direction of its state before the route. The paper's initialisation is not known to us.
        """
        half = torch.eye(len(self.mask), dtype=self.proj.weight.dtype, device=self.proj.weight.device) / 2
        self.proj.weight.copy_(torch.cat([half, half], dim=1))
        # Not by nn.init, which does nothing inside `from_pretrained`: a dense checkpoint has no fusion.
        self.proj.bias.zero_()
        self.mask.normal_(std=0.02)

    def forward(
        self,
        before: torch.Tensor,
        kept: torch.Tensor | None,
        kept_token_ids: torch.Tensor | None = None,
        is_dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            before: [B, N, D], the tokens before the route's first block.
            kept: The tokens after the route's last block: [B, K, D], or [B, N, D] if none was routed away; None if
                the blocks were not run.
            kept_token_ids: [B, K] int64, the ids of `kept`; None for all tokens.
            is_dropped: [B] bool, samples whose tokens are all replaced by the mask vector; None for no sample.

        Returns:
            [B, N, D] in the dtype of `before`.
        """
        # The state after the route, with the mask vector where there is none.
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

        # DDP waits for a gradient of each parameter, even in a dense step.
        uses_mask = kept is None or kept_token_ids is not None or is_dropped is not None
        return fused if uses_mask or not torch.is_grad_enabled() else fused + 0.0 * mask


def make_fusions(routes: Sequence[TokenRoute], dim: int) -> nn.ModuleDict:
    """A `RouteFusion` for each route with `rejoin="fuse"`, keyed by the route's index."""
    # Not a ModuleList: diffusers' caches and offloading would take it for a list of blocks.
    return nn.ModuleDict(
        {str(index): RouteFusion(dim) for index, route in enumerate(routes) if route.rejoin == "fuse"}
    )
