# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers of the transformers library, such as DINOv2, as feature extractors."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...hub_errors import ADVICE, LOST
from .feature_extractor import TorchFeatureExtractor


def load_transformers(repository: str, weights: Path | None = None) -> TorchFeatureExtractor:
    """Loads a transformers model; its feature is the class token after the last normalisation.

    Size, mean and std come from preprocessor_config.json. The image processor itself is not used: the fast ones need
    torchvision, and DINOv2's crops the border. Weights are read from safetensors only.

    Args:
        repository: Repository on the Hub, or a local folder.
        weights: Must be None; the weights are those of the repository.

    Raises:
        ImportError: transformers is not installed.
        ValueError: There is no such model, or it has no class token.
    """
    if weights is not None:
        raise ValueError(f'Expected no weights beside a model folder, got {weights}. Use "transformers:<folder>".')
    try:
        from transformers import AutoModel, ImageProcessingMixin
    except ImportError as error:
        raise ImportError(f'Expected transformers, got "{error}". Do `pip install transformers`.') from error

    # The model, and the size and normalisation that its processor would use.
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(repository)
        size, mean, std = settings.get("crop_size") or settings["size"], settings["image_mean"], settings["image_std"]
        model = AutoModel.from_pretrained(repository, use_safetensors=True)
    except (ValueError, KeyError, *LOST) as error:
        raise ValueError(
            f"Expected a model with safetensors and a preprocessor_config.json at {repository}, got {error}. {ADVICE}"
        ) from error
    if not any(name.endswith("cls_token") for name, _ in model.named_parameters()):
        raise ValueError(
            f"Expected a vision transformer with a class token, got {type(model).__name__} of {repository}. Use a "
            "DINOv2, or TorchFeatureExtractor with a network of your own."
        )
    network = _ClassToken(model.float())
    return TorchFeatureExtractor(network, name=f"transformers:{repository}", size=_side(size), mean=mean, std=std)


class _ClassToken(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state[:, 0]  # B N D to B D


def _side(size: Any) -> int:
    """Reads 224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
