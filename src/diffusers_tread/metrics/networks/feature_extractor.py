# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The base class of networks that turn 8-bit images into features, and one for any PyTorch network.

Shapes: B images, H and W their sides, D features.
"""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ...fingerprint import weights_fingerprint
from ...finite import check_finite


class FeatureExtractor:
    """Base class of feature extractors; subclasses implement `extract`.

    Args:
        network: The network. It is put into evaluation mode and its gradients are switched off.
        name: Name such as "inception" or "timm:resnet50".
        outputs: Names of the tensors that a call returns. "features" (pooled) is always among them; "spatial" (for
            sFID) and "logits" (for the Inception Score) are there if the network has them.
        settings: Everything besides the weights that changes the features, as JSON.

    Raises:
        ValueError: Weights have NaN or infinity.
    """

    def __init__(self, network: nn.Module, *, name: str, outputs: tuple[str, ...], settings: dict[str, Any]):
        check_finite(network.state_dict(), what=f"weights of {name}")
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.outputs = outputs
        self.device = torch.device("cpu")
        self.fingerprint = f"{name.partition(':')[0]}:{_fingerprint(network, settings)}"
        """Kind and hash of weights and settings. Features are comparable only if the fingerprints are equal; a model
        on the Hub and a copy of it in a local folder have the same one."""

    @property
    def description(self) -> dict[str, str]:
        """Identifies the features in feature stores and results (JSON)."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    def to(self, device: str | torch.device) -> "FeatureExtractor":
        """Moves the network."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes the features of RGB images.

        Args:
            images: [B, 3, H, W] uint8, on any device.

        Returns:
            A float32 tensor [B, D] for each name in `outputs`, on the extractor's device.

        Raises:
            ValueError: The images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Expected uint8 images [B, 3, H, W], got {images.dtype} {tuple(images.shape)}. Round to 0..255, and "
                "repeat a single channel three times."
            )
        return {name: value.float() for name, value in self.extract(images.to(self.device)).items()}

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps uint8 images [B, 3, H, W] on the extractor's device to the outputs, each [B, D]."""
        raise NotImplementedError


class TorchFeatureExtractor(FeatureExtractor):
    """Features from any network that maps normalised images [B, 3, size, size] to [B, D].

    The whole image is resized with a bicubic, antialiased filter and is not cropped, as for the Fréchet distance of
    DINOv2 features (FDD, arXiv 2306.04675).

    Args:
        network: Called with the normalised images.
        name: Name of the extractor.
        size: Side of the network's input in pixels.
        mean: Mean of each channel, for pixels in 0..1. The default is ImageNet's.
        std: Standard deviation of each channel, likewise.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        size: int,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ):
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        settings = {"size": size, "mean": self.mean, "std": self.std}
        super().__init__(network, name=name, outputs=("features",), settings=settings)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        # Resize, and clamp: a bicubic filter may overshoot the range of 8-bit images.
        size = (self.size, self.size)
        pixels = nn.functional.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
        pixels = pixels.clamp(0, 255) / 255  # B 3 size size

        # Normalise, and run the network.
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        features = self.network((pixels - mean) / std)
        if features.ndim != 2:
            raise ValueError(
                f"Expected a network that gives features [B, D], got {tuple(features.shape)} of {self.name}. Use one "
                "that pools."
            )
        return {"features": features}


def _fingerprint(network: nn.Module, settings: dict[str, Any]) -> str:
    """Hashes weights and settings into 16 hexadecimal digits."""
    content = json.dumps({"settings": settings, "weights": weights_fingerprint(network)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
