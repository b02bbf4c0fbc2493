# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts between images and the latents that a denoiser is trained on, by one formula for all VAEs.

    encoding    latents = (vae.encode(images) - mean) * scaling_factor / std
    decoding    images = vae.decode(latents * std / scaling_factor + mean)

mean and std, as in the pipelines of diffusers:

    AutoencoderKL, DC, Tiny, ...        `shift_factor` and 1, as in Stable Diffusion and Flux
    with `latents_mean`, `latents_std`  these, per channel, from the config or (LTX) the weights, as in SDXL and Wan
    AutoencoderKLFlux2                  from its batch norm, after packing 2x2 pixels of latents into one, as in Flux.2
    AutoencoderRAE                      0 and 1: `encode` and `decode` normalise themselves; images are in [0, 1]

Video VAEs are used with one frame. Shapes: B batch, C channels and S side of the denoiser's latents, M channels of a
stored record: 2C if it holds mean and standard deviation, else C.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ...field_docs import with_field_docs


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class LatentCodec:
    """How the latents of a VAE are normalised for a denoiser, and back.

    Raises:
        ValueError: A number is out of range; only one of mean and std is given; or there is a shift besides them.
    """

    scaling_factor: float = 1.0
    """Factor by which latents are multiplied, positive."""
    shift_factor: float = 0.0
    """Number that is subtracted before, the same for all channels."""
    latents_mean: tuple[float, ...] | None = None
    """C numbers that are subtracted instead, one per channel."""
    latents_std: tuple[float, ...] | None = None
    """C positive numbers by which latents are divided; None for no division."""

    def __post_init__(self):
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None) or (mean is not None and (self.shift_factor or len(mean) != len(std))):
            raise ValueError(
                "Expected a shift_factor, or latents_mean and latents_std of as many numbers, got "
                f"shift_factor={self.shift_factor}, latents_mean={mean}, latents_std={std}. Repair the VAE's config."
            )
        positive, numbers = [self.scaling_factor, *(std or ())], [self.shift_factor, *(mean or ())]
        if not all(map(_is_finite, positive + numbers)) or min(positive) <= 0:
            raise ValueError(
                "Expected finite numbers, and a scaling_factor and latents_std above 0, got "
                f"scaling_factor={self.scaling_factor!r}, shift_factor={self.shift_factor!r}, latents_mean={mean}, "
                f"latents_std={std}."
            )

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalises the VAE's latents [B, C, S, S] for a denoiser."""
        if self.latents_mean is None:
            return (latents - self.shift_factor) * self.scaling_factor
        mean, std = self._statistics(latents)
        return (latents - mean) * self.scaling_factor / std

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`."""
        if self.latents_mean is None:
            return latents / self.scaling_factor + self.shift_factor
        mean, std = self._statistics(latents)
        return latents * std / self.scaling_factor + mean

    def _statistics(self, like: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (self.latents_mean, self.latents_std)]


def latent_codec(vae) -> LatentCodec:
    """Reads the normalisation of a VAE's latents from its config or its weights.

    Raises:
        ValueError: As for `LatentCodec`; the number of statistics is not the number of channels.
    """
    if _normalizes_itself(vae):
        return LatentCodec()
    config, channels = vae.config, latent_channels(vae)
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    mean, std = (_statistic(vae, name, channels) for name in ("latents_mean", "latents_std"))
    if "batch_norm_eps" in config:  # AutoencoderKLFlux2
        mean = vae.bn.running_mean.double().tolist()
        std = (vae.bn.running_var.double() + config.batch_norm_eps).sqrt().tolist()
    return LatentCodec(
        scaling_factor=1.0 if scale is None else scale,
        shift_factor=0.0 if shift is None else shift,
        latents_mean=None if mean is None else tuple(mean),
        latents_std=None if std is None else tuple(std),
    )


def latent_channels(vae) -> int:
    """C, the number of channels of the denoiser's latents.

    Raises:
        ValueError: It is not in the VAE's config.
    """
    for name in ("vq_embed_dim", "latent_channels", "z_dim", "z_channels"):
        if (channels := vae.config.get(name)) is not None:
            return channels * latent_patch_size(vae) ** 2
    if _normalizes_itself(vae):
        return vae.config.encoder_hidden_size
    raise ValueError(f"Expected a VAE with latent_channels in its config, got {type(vae).__name__} without.")


def latent_patch_size(vae) -> int:
    """P: `AutoencoderKLFlux2` packs P x P pixels of latents into one before its batch norm; 1 for other VAEs."""
    return vae.config.patch_size[0] if "batch_norm_eps" in vae.config else 1


def spatial_compression(vae) -> int:
    """Downsampling factor: image pixels per side of one pixel of the denoiser's latents.

    Raises:
        ValueError: The VAE does not tell its factor.
    """
    if _normalizes_itself(vae):
        return vae.config.patch_size
    if (levels := vae.config.get("dim_mult")) is not None:  # Wan and Qwen-Image, whose other fields may be wrong
        return 2 ** (len(levels) - 1) * (vae.config.get("patch_size") or 1)
    ratio = vae.config.get("spatial_compression_ratio") or getattr(vae, "spatial_compression_ratio", None)
    levels = vae.config.get("block_out_channels") or vae.config.get("ch_mult")
    if ratio is None and levels is None:
        raise ValueError(f"Expected a VAE that tells how it shrinks images, got {type(vae).__name__}, which does not.")
    return (ratio or 2 ** (len(levels) - 1)) * latent_patch_size(vae)


def encode_images(vae, pixel_values: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Encodes images to a denoiser's latents, with any image or video VAE of diffusers.

    Args:
        vae: An `AutoencoderKL` (its posterior is sampled), `AutoencoderDC`, `AutoencoderTiny` or another model whose
            `encode` returns a posterior or latents.
        pixel_values: Images [B, 3, H, W] in [-1, 1].
        generator: Source of randomness for the posterior sample.

    Returns:
        Latents [B, C, h, w] in the dtype of the images, normalised as described at the top of this module.

    Raises:
        ValueError: `encode` returned neither a posterior nor latents; as for `latent_codec`.
    """
    posterior, latents = _encode(vae, pixel_values)
    if posterior is not None:
        latents = sample_moments(torch.cat(posterior, dim=1), generator=generator)
    return latent_codec(vae).normalize(latents.to(pixel_values.dtype))


def encode_moments(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encodes images to what a folder of latents stores: moments of the posterior, or latents if the VAE has none.

    Args:
        vae: As for `encode_images`.
        pixel_values: Images [B, 3, R, R] in [-1, 1].

    Returns:
        Mean and standard deviation [B, 2C, S, S], or latents [B, C, S, S]; float32, not normalised.

    Raises:
        ValueError: `encode` returned neither a posterior nor latents.
    """
    posterior, latents = _encode(vae, pixel_values)
    return (latents if posterior is None else torch.cat(posterior, dim=1)).float()


def sample_moments(moments: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Samples latents [B, C, S, S] from posteriors, given as mean and standard deviation [B, 2C, S, S]."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_images`.

    Args:
        vae: As for `encode_images`.
        latents: The denoiser's latents [B, C, h, w].

    Returns:
        Images [B, 3, H, W], float32, in about [-1, 1]: the VAE may overshoot.
    """
    latents = unpack_latents(latent_codec(vae).denormalize(latents), latent_patch_size(vae)).to(vae.dtype)
    images = vae.decode(latents.unsqueeze(2) if _has_frames(vae) else latents, return_dict=False)[0].float()
    images = images.squeeze(2) if _has_frames(vae) else images
    return images * 2 - 1 if _normalizes_itself(vae) else images


def check_vae(vae, resolution: int | tuple[int, int]) -> tuple[str, int, int]:
    """Checks a VAE by encoding and decoding an empty image, before any work starts.

    Args:
        vae: As for `encode_images`.
        resolution: R, side of the images in pixels, or height and width.

    Returns:
        "moments" or "latents", the kind that `encode_moments` returns; C; S, the longer side of the latents.

    Raises:
        ValueError: The model is not a VAE, does not return images of the same size, or makes latents of another size
            than its config says.
    """
    # The factor divides the size.
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    pixels = torch.zeros(1, 3, height, width, device=vae.device)
    name, factor = type(vae).__name__, spatial_compression(vae)
    for side in (height, width):
        if side % factor:
            raise ValueError(
                f"Expected a --resolution that is a multiple of the VAE's downsampling, got {side}, which becomes "
                f"{side // factor}: {name} makes one pixel of {factor}x{factor}."
            )

    # Encode and decode.
    try:
        with torch.no_grad():
            posterior, _ = _encode(vae, pixels)
            latents = encode_images(vae, pixels)
            images = decode_latents(vae, latents)
    except (
        RuntimeError,
        TypeError,
        AttributeError,
        IndexError,
        ValueError,
    ) as error:  # a foreign model may raise any of them
        raise ValueError(
            f"Expected a VAE that encodes and decodes single images of {height}x{width} pixels, got {name}, "
            f"which raises: {error}. Choose another --resolution or VAE."
        ) from error

    # The sizes are right.
    expected = (latent_channels(vae), height // factor, width // factor)
    if latents.shape != (1, *expected) or images.shape != pixels.shape:
        raise ValueError(
            f"Expected a VAE that makes latents {list(expected)} of images of {height}x{width} pixels, and images of "
            f"that size again, got {name}, which makes latents {list(latents.shape[1:])} and images "
            f"{list(images.shape[1:])}. Choose another --resolution or VAE."
        )
    return "latents" if posterior is None else "moments", expected[0], max(expected[1:])


def pack_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Packs P x P squares of [B, C, H, W] into pixels, [B, C*P*P, H/P, W/P], in the order of diffusers' Flux.2."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // patch_size, width // patch_size)


def unpack_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The inverse of `pack_latents`."""
    batch, _, height, width = latents.shape
    patches = latents.reshape(batch, -1, patch_size, patch_size, height, width)
    return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * patch_size, width * patch_size)


def _encode(vae, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
    """Encodes images to mean and standard deviation of the posterior, or to latents, depending on the VAE."""
    # Encode.
    pixel_values = (pixel_values + 1) / 2 if _normalizes_itself(vae) else pixel_values
    pixel_values = pixel_values.unsqueeze(2) if _has_frames(vae) else pixel_values
    with torch.no_grad():
        encoded = vae.encode(pixel_values.to(vae.dtype))

    def prepare(latents: torch.Tensor) -> torch.Tensor:
        return pack_latents(latents.squeeze(2) if _has_frames(vae) else latents, latent_patch_size(vae))

    # Find posterior or latents in the output.
    posterior = getattr(encoded, "latent_dist", None)
    if hasattr(posterior, "std"):
        return [prepare(posterior.mean), prepare(posterior.std)], None
    if posterior is not None:  # AutoencoderKLCosmos
        return None, prepare(posterior.mode())
    for name in ("latent", "latents"):  # AutoencoderDC and RAE; AutoencoderTiny and VQModel
        if hasattr(encoded, name):
            return None, prepare(getattr(encoded, name))
    raise ValueError(f"Expected a VAE whose encode() returns a posterior or latents, got {type(encoded).__name__}.")


def _statistic(vae, name: str, channels: int) -> Sequence[float] | None:
    """`latents_mean` or `latents_std` of a VAE, from its config or (LTX) from a buffer."""
    values = vae.config.get(name)
    if values is None:
        buffer = dict(vae.named_buffers(recurse=False)).get(name)
        return None if buffer is None else buffer.double().tolist()
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"Expected a list of numbers as {name} of {type(vae).__name__}, got {values!r}.")
    frames = len(values) // channels if _has_frames(vae) and len(values) % channels == 0 else 1
    values = values[::frames] if frames > 1 else values  # AutoencoderKLCosmos repeats them for each frame
    if len(values) != channels:
        raise ValueError(
            f"Expected {channels} numbers as {name} of {type(vae).__name__}, one for each channel of its latents, got "
            f"{len(values)}. Repair the VAE's config."
        )
    return values


def _normalizes_itself(vae) -> bool:
    """Whether the VAE is an `AutoencoderRAE`, a class that diffusers 0.36 does not have."""
    return "encoder_norm_mean" in vae.config


def _has_frames(vae) -> bool:
    """Whether the VAE is for videos, [B, C, F, H, W]. This includes Qwen-Image 2.1's, despite its 2D convolutions."""
    encoder = getattr(vae, "encoder", vae)
    return "temperal_downsample" in vae.config or any(isinstance(part, torch.nn.Conv3d) for part in encoder.modules())


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
