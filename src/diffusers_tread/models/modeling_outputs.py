# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the denoisers of this package return."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from ..field_docs import with_field_docs


@with_field_docs
@dataclass
class DenoiserOutput(BaseOutput):
    """The prediction of a denoiser and what else was asked for.

    Shapes: B batch, C channels, H and W latent size, N tokens, K kept tokens, D width.
    """

    sample: torch.Tensor
    """[B, C, H, W], in the dtype of the input."""

    kept_token_ids: list[torch.Tensor | None] | None = None
    """Per route the ids of the kept tokens, [B, K] int64, or None for a route not taken, for losses that tell kept
    tokens from routed ones. None for a dense forward."""

    prefix: torch.Tensor | None = None
    """[B, N, D], the tokens in front of the first route's first block, if `return_prefix` asked for them. D channels
    more where blocks hand more on than tokens, and for each earlier state that is to rejoin."""

    hidden_states: dict[int, torch.Tensor] | None = None
    """By the index of the block, the tokens after each block of `hidden_states_at`: [B, N, D], or [B, K, D] of the
    kept tokens for a block in a route that was taken."""

    projected_states: dict[int, torch.Tensor] | None = None
    """By the index of the block, what `DenoiserWithHeads` made of the tokens after it."""
