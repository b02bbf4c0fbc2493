# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From images to the latents that a denoiser is trained on."""

import torch


def encode_images(vae, pixel_values: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Encodes images with any diffusers image VAE, shifted and scaled as its config says.

    Args:
        vae: An `AutoencoderKL` (a sample of its posterior is taken), `AutoencoderDC`, `AutoencoderTiny` or other model
            whose `encode` returns a posterior or latents.
        pixel_values: [B, 3, H, W] in [-1, 1].
        generator: Source of randomness for the posterior sample.

    Returns:
        [B, C, h, w], `(latents - shift_factor) * scaling_factor`.

    Raises:
        ValueError: `encode` returned neither.
    """
    with torch.no_grad():
        encoded = vae.encode(pixel_values.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.sample(generator)
    elif hasattr(encoded, "latent"):  # AutoencoderDC
        latents = encoded.latent
    elif hasattr(encoded, "latents"):  # AutoencoderTiny, VQModel
        latents = encoded.latents
    else:
        raise ValueError(
            f"Expected a VAE whose encode() returns a posterior or latents, got {type(encoded).__name__}."
        )
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    return (latents.to(pixel_values.dtype) - shift) * scale
