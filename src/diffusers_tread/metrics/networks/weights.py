# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Weights of the networks: downloads that are verified, and state dicts that are read without running code."""

from pathlib import Path

import safetensors.torch
import torch


# Hashes of the files that torch-fidelity and clean-fid download, as published by projects that pin them.
SHA256 = {
    "weights-inception-2015-12-05-6726825d.pth": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "inception-2015-12-05.pt": "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
}


def download_weights(url: str) -> Path:
    """Downloads a file to torch's cache unless it is already there, and checks its hash if it is known.

    An interrupted download leaves no file behind.

    Raises:
        ValueError: The download failed, or the file has another hash.
    """
    name = url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256.get(name))
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise ValueError(
                f"Expected to download {url}, got {error}. Download it elsewhere and give the file as weights, or put "
                f"it at {path}."
            ) from error
    return path


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict from a .safetensors file or from torch's format, of which only tensors are unpickled.

    Raises:
        ValueError: The file holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds on damaged or foreign files
        raise ValueError(f"Expected a state dict of tensors in {path}, got a file that is none ({error}).") from error
