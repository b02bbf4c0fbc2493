# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Networks that turn 8-bit images into features, all behind one call.

Shapes: B images, H and W their sides, D features.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..fingerprint import weights_fingerprint


class FeatureExtractor:
    """What every extractor has; subclasses write `extract`.

    Args:
        network: Put into evaluation mode, without gradients.
        name: Such as "inception".
        outputs: What a call gives. "features" is always there, for the Fréchet distance, precision and recall;
            "spatial" (for sFID) and "logits" (for the Inception Score) are where the network has them.
        settings: JSON; what changes the features beside the weights.
    """

    def __init__(self, network: nn.Module, *, name: str, outputs: tuple[str, ...], settings: dict[str, Any]):
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.outputs = outputs
        self.device = torch.device("cpu")
        self.fingerprint = f"{name.partition(':')[0]}:{_fingerprint(network, settings)}"
        """Kind and hash of weights and settings: equal only where features are comparable, and the same for a model
        on the Hub and its copy in a folder."""

    def to(self, device: str | torch.device) -> "FeatureExtractor":
        """Moves the network."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of RGB images.

        Args:
            images: [B, 3, H, W] uint8, on any device.

        Returns:
            A float32 tensor [B, D] per name in `outputs`, on the extractor's device.

        Raises:
            ValueError: Anything but such images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Expected uint8 images [B, 3, H, W], got {images.dtype} {tuple(images.shape)}. Round to 0..255, and "
                "repeat a single channel three times."
            )
        return {name: value.float() for name, value in self.extract(images.to(self.device)).items()}

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs [B, D] of uint8 images [B, 3, H, W] on the extractor's device."""
        raise NotImplementedError


class TorchFeatureExtractor(FeatureExtractor):
    """Features of any network that maps normalised images [B, 3, size, size] to [B, D].

    The whole image is resized, with a bicubic, antialiased filter, and not cropped, as for the Fréchet distance of
    DINOv2 features (FDD, arXiv 2306.04675).

    Args:
        network: Called with the images.
        name: What the features are known by.
        size: Side of its input in pixels.
        mean: Of each channel, in units of the range 0..1. The default is ImageNet's.
        std: Likewise.
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
        size = (self.size, self.size)
        # A bicubic filter overshoots; an 8-bit image cannot.
        pixels = (
            nn.functional.interpolate(images.float(), size=size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        )
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        features = self.network((pixels - mean) / std)
        if features.ndim != 2:
            raise ValueError(
                f"Expected a network that gives features [B, D], got {tuple(features.shape)} of {self.name}. Use one "
                "that pools."
            )
        return {"features": features}


def load_feature_extractor(
    spec: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Loads a network by name.

    Args:
        spec: One of
            "inception": the Inception of 2015 as torch-fidelity has it, resized as TensorFlow 1 does: that of FID,
                sFID, Inception Score, precision and recall in papers.
            "clean-fid:clean" and "clean-fid:legacy_tensorflow": the same network as clean-fid has it, with clean-fid's
                resizing and with the original one. Features only.
            "transformers:<repository or folder>": the class token of a transformer, such as
                "transformers:facebook/dinov2-large" for FDD. Features only.
            "timm:<name>": the pooled features of a timm model. Features only.
        weights: A local file to use instead of a download: for "inception" and "timm" a state dict (.safetensors, or
            .pth, of which nothing but tensors is unpickled), for "clean-fid" its inception-2015-12-05.pt.
        device: Where the network runs.

    Raises:
        ValueError: An unknown spec; a weights file that is missing or of another network; a failed download.
        ImportError: The library is not installed.
    """
    kind, _, argument = spec.partition(":")
    loaders = {
        "inception": _load_inception,
        "clean-fid": _load_clean_fid,
        "transformers": _load_transformers,
        "timm": _load_timm,
    }
    if kind not in loaders or (kind == "inception") != (argument == ""):
        raise ValueError(
            'Expected "inception", "clean-fid:clean", "clean-fid:legacy_tensorflow", "transformers:<repository or '
            f'folder>" or "timm:<name>", got {spec!r}. Use one of them.'
        )
    if weights is not None:
        weights = Path(weights)
        if not weights.is_file():
            raise ValueError(f"Expected a file with the weights of {spec}, got no file at {weights}. Check the path.")
    return loaders[kind](argument, weights).to(device)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a .safetensors file or, unpickling nothing but tensors, of torch's own format.

    Raises:
        ValueError: Another file.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds on damaged or foreign files
        raise ValueError(f"Expected a state dict of tensors in {path}, got a file that is none ({error}).") from error


def load_state_dict(network: nn.Module, state: dict[str, torch.Tensor], *, name: str) -> None:
    """`Module.load_state_dict` with one clear error.

    Raises:
        ValueError: Missing, unexpected or misshapen weights.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"Expected the weights of {name}, got others. Use its own file. {error}") from error


def _load_inception(argument: str, weights: Path | None) -> FeatureExtractor:
    from .inception import InceptionExtractor

    return InceptionExtractor(weights)


def _load_clean_fid(mode: str, weights: Path | None) -> FeatureExtractor:
    from .inception import CleanFIDExtractor

    return CleanFIDExtractor(mode, weights)


def _load_transformers(repository: str, weights: Path | None) -> FeatureExtractor:
    if weights is not None:
        raise ValueError(f'Expected no weights beside a model folder, got {weights}. Use "transformers:<folder>".')
    from .pretrained import load_transformers

    return load_transformers(repository)


def _load_timm(name: str, weights: Path | None) -> FeatureExtractor:
    from .pretrained import load_timm

    return load_timm(name, weights)


def _fingerprint(network: nn.Module, settings: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of weights and settings."""
    content = json.dumps({"settings": settings, "weights": weights_fingerprint(network)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
