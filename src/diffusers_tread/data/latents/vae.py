# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Loads the VAE that makes the latents of a folder, and identifies it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers import AutoModel

from ...fingerprint import weights_fingerprint
from ...hub_errors import ADVICE, LOST
from .codec import LatentCodec, latent_codec


@dataclass(frozen=True, kw_only=True)
class LoadedVAE:
    """A VAE loaded by `load_vae`."""

    model: torch.nn.Module
    """The VAE on its device, without gradients."""
    identity: dict[str, Any]
    """`LatentsInfo.vae`: its name or path, its commit, a hash of its weights, its precision."""
    codec: LatentCodec
    """How its latents are normalised."""


def load_vae(
    name: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> LoadedVAE:
    """Loads a VAE to encode a data set.

    Args:
        name: A folder or a repository on the Hub.
        subfolder: Folder of the VAE in it.
        revision: Branch, tag or commit of the repository.
        dtype: Precision of the VAE.
        device: Device of the VAE.

    Raises:
        ValueError: There is no diffusers VAE with safetensors weights.
    """
    # Load.
    place = {key: value for key, value in {"subfolder": subfolder, "revision": revision}.items() if value is not None}
    try:
        vae = AutoModel.from_pretrained(name, **place, use_safetensors=True)
    except (ValueError, *LOST) as error:
        raise ValueError(
            f"Expected a diffusers VAE with safetensors weights at {name}, got: {error} {ADVICE}"
        ) from error
    if not hasattr(vae, "encode"):
        raise ValueError(f"Expected a VAE at {name}, got {type(vae).__name__}. Name its --vae_subfolder.")

    # Identity. The commit of a repository is the name of the folder with its cached files.
    cached = None
    if not Path(name).exists():
        config = "/".join(filter(None, (subfolder, "config.json")))
        cached = huggingface_hub.try_to_load_from_cache(name, config, revision=revision)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", cached if isinstance(cached, str) else "")
    identity = {
        "name_or_path": name,
        "subfolder": subfolder,
        "revision": commit[1] if commit else revision,
        "class_name": type(vae).__name__,
        "fingerprint": weights_fingerprint(vae),
        "dtype": dtype,
    }

    # Codec, then the cast, which would round statistics that are weights.
    codec = latent_codec(vae)
    vae = vae.to(device).requires_grad_(False).eval()
    vae = vae if dtype == "float32" else vae.to(getattr(torch, dtype))
    return LoadedVAE(model=vae, identity=identity, codec=codec)
