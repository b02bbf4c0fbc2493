# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Networks of the timm library as feature extractors."""

from pathlib import Path

import torch

from .feature_extractor import TorchFeatureExtractor
from .weights import read_state_dict


def load_timm(name: str, weights: Path | None = None) -> TorchFeatureExtractor:
    """Loads a timm model; its features are the pooled ones before the classifier.

    Args:
        name: Name of the model, such as "vit_large_patch14_dinov2.lvd142m".
        weights: File with a state dict; None for timm's download.

    Raises:
        ImportError: timm, or the torchvision it imports, is missing or broken.
        ValueError: There is no such model, or the weights are for another one.
    """
    try:
        import timm  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ImportError(
            f'Expected timm and a torchvision for torch {torch.__version__}, got "{error}". Take a torchvision '
            "from the index of that torch, then do `pip install --no-deps timm`."
        ) from error
    try:
        model = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"Expected a timm model with pretrained weights, got {name!r}: {error}") from error
    if weights is not None:
        try:
            model.load_state_dict(read_state_dict(weights))
        except RuntimeError as error:
            raise ValueError(f"Expected the weights of timm:{name} in {weights}, got others. {error}") from error

    # Without its classifier, a model returns the classifier's input.
    model.reset_classifier(0)
    config = timm.data.resolve_model_data_config(model)
    return TorchFeatureExtractor(
        model, name=f"timm:{name}", size=config["input_size"][-1], mean=config["mean"], std=config["std"]
    )
