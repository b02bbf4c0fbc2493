# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors out of transformers and timm."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .features import TorchFeatureExtractor, load_state_dict, read_state_dict


def load_transformers(repository: str) -> TorchFeatureExtractor:
    """The class token of a transformers model, after its last normalisation.

    Size, mean and std are those of its preprocessor_config.json; the processor itself is not used: the fast ones need
    torchvision, and DINOv2's cuts the border off. Only safetensors are read.

    Args:
        repository: Repository on the Hub, or a folder.

    Raises:
        ImportError: transformers is not installed.
        ValueError: No such model, or one without a class token.
    """
    try:
        from transformers import AutoModel, ImageProcessingMixin
    except ImportError as error:
        raise ImportError(f'Expected transformers, got "{error}". Do `pip install transformers`.') from error
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(repository)
        size, mean, std = settings.get("crop_size") or settings["size"], settings["image_mean"], settings["image_std"]
        model = AutoModel.from_pretrained(repository, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected a model with safetensors and a preprocessor_config.json at {repository}, got {error}"
        ) from error
    if not any(name.endswith("cls_token") for name, _ in model.named_parameters()):
        raise ValueError(
            f"Expected a vision transformer with a class token, got {type(model).__name__} of {repository}. Use a "
            "DINOv2, or TorchFeatureExtractor with a network of your own."
        )
    network = _ClassToken(model.float())
    return TorchFeatureExtractor(network, name=f"transformers:{repository}", size=_side(size), mean=mean, std=std)


def load_timm(name: str, weights: Path | None) -> TorchFeatureExtractor:
    """The pooled features of a timm model, before its classifier.

    Args:
        name: Of the model, such as "vit_large_patch14_dinov2.lvd142m".
        weights: A state dict instead of timm's download.

    Raises:
        ImportError: timm, or the torchvision it imports, is missing or broken.
        ValueError: No such model, or weights of another one.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ImportError(
            f'Expected timm and a torchvision for torch {torch.__version__}, got "{error}". Do `pip install timm`.'
        ) from error
    try:
        model = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"Expected a timm model with pretrained weights, got {name!r}: {error}") from error
    if weights is not None:
        load_state_dict(model, read_state_dict(weights), name=f"timm:{name}")
    model.reset_classifier(0)
    config = timm.data.resolve_model_data_config(model)
    return TorchFeatureExtractor(
        model, name=f"timm:{name}", size=config["input_size"][-1], mean=config["mean"], std=config["std"]
    )


class _ClassToken(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state[:, 0]


def _side(size: Any) -> int:
    """Of 224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
