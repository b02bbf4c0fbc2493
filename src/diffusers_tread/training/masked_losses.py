# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loss of TREAD's first version: the kept tokens are denoised, the routed ones reconstruct their noisy input.

Shapes: B batch, C channels, H and W latent size, P patch size, N tokens, K kept tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..models import TREADTransformer2DModel
from ..routing.router import unwrap_routed


def masked_loss(
    error: torch.Tensor,
    *,
    denoised: torch.Tensor,
    noisy: torch.Tensor,
    kept_token_ids: list[torch.Tensor | None],
    patch_size: int,
    reconstruction_weight: float,
) -> torch.Tensor:
    """The mean over the routes of L_dsm over the tokens a route keeps + lambda L_mae over those it routes away.

    The loss of TREAD v1 (arXiv 2501.04765v1). The reconstruction is MaskDiT's (arXiv 2306.09305): the denoised latents
    at the routed tokens, from the same output layer, are compared with the noisy latents, each patch of which is
    normalised by its own mean and variance + 1e-6 (MAE, arXiv 2111.06377). Each term is a mean over its own tokens.
    Whether v1 differs from MaskDiT in any of this is not known.

    Args:
        error: [B, C, H, W] float32, the squared error of the plain loss.
        denoised: [B, C, H, W] float32, the clean latents that the prediction stands for.
        noisy: [B, C, H, W] float32, the clean latents with their noise, not scaled for the network.
        kept_token_ids: Per route [B, K] int64, or None for a route not taken, which keeps all tokens.
        patch_size: P.
        reconstruction_weight: lambda, >= 0.

    Returns:
        [B] float32.
    """
    token_error = _patches(error, patch_size).mean(dim=2)  # B N
    if reconstruction_weight > 0:
        target = _patches(noisy, patch_size)  # B N P*P*C
        target = F.layer_norm(target, target.shape[2:], eps=1e-6)
        reconstruction_error = (_patches(denoised, patch_size) - target).square().mean(dim=2)  # B N

    losses = []
    for ids in kept_token_ids:
        if ids is None:
            losses.append(token_error.mean(dim=1))
            continue
        loss = token_error.gather(1, ids).mean(dim=1)
        if reconstruction_weight > 0:
            is_routed = torch.ones_like(token_error).scatter(1, ids, 0.0)
            routed = (is_routed * reconstruction_error).sum(dim=1) / (token_error.shape[1] - ids.shape[1])
            loss = loss + reconstruction_weight * routed
        losses.append(loss)
    return torch.stack(losses).mean(dim=0)


def check_masked_loss(denoiser: Callable[..., Any], *, reconstruction_weight: float | None) -> int | None:
    """The patch size of a denoiser that can be trained with `masked_loss`; None if there is no weight.

    Raises:
        ValueError: It is no `TREADTransformer2DModel`, bare or wrapped by `torch.compile`, DDP or FSDP, or has no
            routes; or its patches have a single value, which is 0 once normalised and leaves nothing to reconstruct.
    """
    if reconstruction_weight is None:
        return None
    model = unwrap_routed(denoiser)
    if not isinstance(model, TREADTransformer2DModel) or not model.token_router.routes:
        raise ValueError(
            f"Expected a TREADTransformer2DModel with routes for reconstruction_weight={reconstruction_weight}, got "
            f"{type(model).__name__}. Give it routes, or leave the weight out for the plain loss."
        )
    patch_size, channels = model.config.patch_size, model.config.in_channels
    if reconstruction_weight > 0 and patch_size**2 * channels == 1:
        raise ValueError(
            f"Expected patches of several values for reconstruction_weight={reconstruction_weight}, got 1x1 of one "
            "channel. Use a larger patch size, or 0.0 to train on the kept tokens alone."
        )
    return patch_size


def _patches(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, C, H, W] to [B, N, C*P*P], rows of patches one after the other, as the model has its tokens."""
    return F.unfold(latents, patch_size, stride=patch_size).transpose(1, 2)
