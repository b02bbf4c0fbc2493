# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The denoisers: transformer, Mamba-2 and RWKV, and what they share."""

from .latent_denoiser import LatentDenoiser
from .mamba_tread_2d import TREADMamba2DModel
from .modeling_outputs import DenoiserOutput
from .registry import DENOISERS, denoiser_class, make_denoiser, register_denoiser
from .rwkv_tread_2d import TREADRWKV2DModel
from .transformer_tread_2d import TREADTransformer2DModel


__all__ = [
    "DENOISERS",
    "DenoiserOutput",
    "LatentDenoiser",
    "TREADMamba2DModel",
    "TREADRWKV2DModel",
    "TREADTransformer2DModel",
    "denoiser_class",
    "make_denoiser",
    "register_denoiser",
]
