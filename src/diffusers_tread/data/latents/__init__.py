# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .codec import LatentCodec, check_vae, decode_latents, encode_images, encode_moments, latent_codec
from .info import LatentsInfo
from .reading import LatentsDataset, StreamingLatentsDataset, latents_from_moments, open_latents
from .writing import LatentsWriter, verify_latents


__all__ = [
    "LatentCodec",
    "LatentsDataset",
    "LatentsInfo",
    "LatentsWriter",
    "StreamingLatentsDataset",
    "check_vae",
    "decode_latents",
    "encode_images",
    "encode_moments",
    "latent_codec",
    "latents_from_moments",
    "open_latents",
    "verify_latents",
]
