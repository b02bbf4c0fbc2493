# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the denoisers of this package return."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from ..field_docs import with_field_docs


@with_field_docs
@dataclass
class DenoiserOutput(BaseOutput):
    """The prediction of a denoiser, and whatever else was requested.

    Shapes: B batch, C channels, H and W latent size, N tokens, K kept tokens, D width.
    """

    sample: torch.Tensor
    """[B, C, H, W], in the dtype of the input."""

    kept_token_ids: list[torch.Tensor | None] | None = None
    """Per route the ids of the kept tokens, [B, K] int64, or None for a route not taken, for losses that treat kept
    and routed tokens differently. None for a dense forward."""

    prefix: torch.Tensor | None = None
    """[B, N, D], the tokens before the first route's first block, with `return_prefix`. It has D more channels if
    blocks pass on more than tokens, and for each earlier state that a route rejoins with."""

    hidden_states: dict[int, torch.Tensor] | None = None
    """Block index to the tokens after it, for each block of `hidden_states_at`: [B, N, D], or the kept ones,
    [B, K, D], inside a route that was taken."""

    projected_states: dict[int, torch.Tensor] | None = None
    """Block index to the output of `DenoiserWithHeads`' head on the tokens after it."""
