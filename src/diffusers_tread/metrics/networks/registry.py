# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The table of feature networks, and loading one by its name."""

from collections.abc import Callable
from pathlib import Path

import torch

from .clean_fid import CleanFIDExtractor
from .feature_extractor import FeatureExtractor
from .from_timm import load_timm
from .from_transformers import load_transformers
from .inception import InceptionExtractor


# Loaders by the part of a name before the colon. Each takes the part behind it and a file with weights.
LOADERS: dict[str, Callable[[str, Path | None], FeatureExtractor]] = {
    "inception": lambda _, weights: InceptionExtractor(weights),
    "clean-fid": CleanFIDExtractor,
    "transformers": load_transformers,
    "timm": load_timm,
}


def load_feature_extractor(
    spec: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Loads a network by name.

    Args:
        spec: One of

            - "inception": the Inception of 2015 in torch-fidelity's port, with TensorFlow 1's resizing: the network
              of FID, sFID, Inception Score, precision and recall in papers.
            - "clean-fid:clean" and "clean-fid:legacy_tensorflow": the same network from clean-fid, with clean-fid's
              or TensorFlow 1's resizing. Features only.
            - "transformers:<repository or folder>": the class token of a vision transformer, such as
              "transformers:facebook/dinov2-large" for FDD. Features only.
            - "timm:<name>": the pooled features of a timm model. Features only.
        weights: A local file to use instead of a download: for "inception" and "timm" a state dict (.safetensors, or
            .pth, from which only tensors are unpickled), for "clean-fid" its inception-2015-12-05.pt.
        device: Device of the network.

    Raises:
        ValueError: The name is unknown; the weights are missing or are for another network; a download failed.
        ImportError: The library is not installed.
    """
    kind, _, argument = spec.partition(":")
    if kind not in LOADERS or (kind == "inception") != (argument == ""):
        raise ValueError(
            'Expected "inception", "clean-fid:clean", "clean-fid:legacy_tensorflow", "transformers:<repository or '
            f'folder>" or "timm:<name>", got {spec!r}. Use one of them.'
        )
    if weights is not None:
        weights = Path(weights)
        if not weights.is_file():
            raise ValueError(f"Expected a file with the weights of {spec}, got no file at {weights}. Check the path.")
    return LOADERS[kind](argument, weights).to(device)
