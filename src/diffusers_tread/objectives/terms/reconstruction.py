# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loss of TREAD's first version: kept tokens are denoised, routed tokens reconstruct their noisy input.

Shapes: B batch, C channels, P patch size, N tokens, K kept tokens.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...field_docs import with_field_docs
from .base import ForwardRecord, LossTerm


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class ReconstructionLoss(LossTerm):
    """The mean over routes of L_dsm on the kept tokens + lambda * L_mae on the routed tokens.

    This loss of TREAD v1 (arXiv 2501.04765v1) replaces the denoising loss of all tokens, which the final version uses;
    dense forwards use the latter in any case. The reconstruction is MaskDiT's (arXiv 2306.09305): at the routed tokens
    the denoised latents, from the same output layer, are compared with the noisy latents, where each patch is
    normalised by its own mean and unbiased variance + 1e-6 (MAE, arXiv 2111.06377). Each term is a mean over its own
    tokens.

    Raises:
        ValueError: A field is out of range.
    """

    replaces_denoising: ClassVar[bool] = True

    patch_size: int
    """P, of the model's patches."""

    weight: float = 0.1
    """lambda, at least 0: 0.1 in the paper's text; 0.0 (no reconstruction) in the released run."""

    def __post_init__(self):
        if not (isinstance(self.weight, (int, float)) and 0 <= self.weight < math.inf):
            raise ValueError(f"Expected weight to be a finite number >= 0, got {self.weight!r}. Use 0.1.")

    @classmethod
    def for_model(cls, model: torch.nn.Module, *, weight: float = 0.1) -> "ReconstructionLoss":
        """The term for a denoiser of patches.

        Raises:
            ValueError: The model has no routes or no patches; or its patches have a single value, which normalisation
                makes 0, so that nothing is left to reconstruct.
        """
        config: Any = getattr(model, "config", {})
        routes = getattr(getattr(model, "token_router", None), "routes", ())
        patch_size, channels = config.get("patch_size"), config.get("in_channels")
        is_hooked = hasattr(model, "_token_routing")  # its output does not include the kept tokens
        if not routes or is_hooked or patch_size is None or channels is None:
            raise ValueError(
                "Expected a denoiser of this package with patches and routes for the reconstruction loss, got "
                f"{type(model).__name__}. Give it routes, or leave the term out for the plain loss."
            )
        if weight > 0 and patch_size**2 * channels == 1:
            raise ValueError(
                f"Expected patches of several values for a reconstruction weight of {weight}, got 1x1 of one channel. "
                "Use a larger patch size, or 0.0 to train on the kept tokens alone."
            )
        return cls(patch_size=patch_size, weight=weight)

    def __call__(self, record: ForwardRecord) -> torch.Tensor:
        # A dense forward.
        error = (record.prediction - record.target).square()
        if record.kept_token_ids is None:
            return error.mean(dim=(1, 2, 3))

        # Per token: the errors of denoising and of reconstruction.
        token_error = self._patches(error).mean(dim=2)  # B N
        if self.weight > 0:
            target = self._patches(record.noisy)  # B N C*P*P
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - mean) * (variance + 1e-6).rsqrt()
            reconstruction_error = (self._patches(record.denoise(record.prediction)) - target).square().mean(dim=2)

        # Per route: the first over the kept tokens, the second over the routed ones.
        losses = []
        for ids in record.kept_token_ids:
            if ids is None:
                losses.append(token_error.mean(dim=1))
                continue
            loss = token_error.gather(1, ids).mean(dim=1)
            if self.weight > 0:
                is_routed = torch.ones_like(token_error).scatter(1, ids, 0.0)
                routed = (is_routed * reconstruction_error).sum(dim=1) / (token_error.shape[1] - ids.shape[1])
                loss = loss + self.weight * routed
            losses.append(loss)
        return torch.stack(losses).mean(dim=0)

    def _patches(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, N, C*P*P], patches row by row, in the order of the model's tokens."""
        return F.unfold(latents, self.patch_size, stride=self.patch_size).transpose(1, 2)
