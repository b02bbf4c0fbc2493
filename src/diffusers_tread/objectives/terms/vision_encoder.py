# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Patch features of a frozen vision transformer, one for each token of a denoiser.

Shapes: B batch, N tokens, L tokens of the encoder, E the encoder's width.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache

from ...fingerprint import weights_fingerprint
from ...hub_errors import ADVICE, LOST


class VisionEncoder:
    """A vision transformer of the transformers library, such as DINOv2, DINOv3, SigLIP or the image tower of CLIP.

    It is frozen, and not a module, so that nothing trains, wraps or saves it.

    Args:
        model: Its config has `patch_size`, `image_size` and `hidden_size`; its patches come last among its tokens.
        mean: Mean of each channel of images in [0, 1], from its processor.
        std: Standard deviation of each channel, likewise.
        revision: The commit of its repository, if known.

    Raises:
        ValueError: The model does not take images in square patches.
    """

    def __init__(self, model: torch.nn.Module, *, mean: list[float], std: list[float], revision: str | None = None):
        # Patches and normalisation.
        self.model = model.requires_grad_(False).eval()
        patch_size, image_size = (getattr(model.config, name, None) for name in ("patch_size", "image_size"))
        parameters = inspect.signature(model.forward).parameters
        if not isinstance(patch_size, int) or image_size is None or "spatial_shapes" in parameters:
            raise ValueError(
                f"Expected a vision transformer that takes images in square patches, got {type(model).__name__}. Use "
                "a DINOv2, DINOv3, SigLIP or CLIP."
            )
        self.revision, self.normalization = revision, {"mean": list(mean), "std": list(std)}
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
        self.patch_size, self.width, self.dtype = patch_size, model.config.hidden_size, next(model.parameters()).dtype
        side = (image_size if isinstance(image_size, int) else min(image_size)) // patch_size
        self.own_grid = (side, side)

        # Whether it takes any size: on request (CLIP, SigLIP), always (DINOv2), by rotary positions (DINOv3).
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        is_elastic = any(hasattr(module, "interpolate_pos_encoding") for module in model.modules())
        self.takes_any_size = bool(self.options) or is_elastic or hasattr(model, "rope_embeddings")

    @classmethod
    def from_pretrained(cls, repository: str) -> "VisionEncoder":
        """Loads an encoder from the Hub or a folder: weights from safetensors only, in bfloat16 for accelerators.

        Raises:
            ImportError: transformers is not installed.
            ValueError: There is no such model.
        """
        # Model and processor settings.
        try:
            from transformers import AutoModel, ImageProcessingMixin
        except ImportError as error:
            raise ImportError(f'Expected transformers, got "{error}". Do `pip install transformers`.') from error
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(repository)
            dtype = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
            model = AutoModel.from_pretrained(repository, dtype=dtype, use_safetensors=True)
            mean, std = settings["image_mean"], settings["image_std"]
        except (ValueError, KeyError, *LOST) as error:
            raise ValueError(
                f"Expected a vision encoder with safetensors and a preprocessor_config.json at {repository!r}, got "
                f"{error}. {ADVICE}"
            ) from error

        # The commit.
        cached = None if Path(repository).exists() else try_to_load_from_cache(repository, "config.json")
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", cached if isinstance(cached, str) else "")
        vision_model = getattr(model, "vision_model", model)  # without the text tower of CLIP and SigLIP
        return cls(vision_model, mean=mean, std=std, revision=commit[1] if commit else None)

    def identity(self) -> dict[str, Any]:
        """JSON that identifies the encoder independently of its path: encoders with the same identity give the same
        features, up to rounding. Weights are hashed in bfloat16, their dtype on accelerators."""
        fingerprint = weights_fingerprint(self.model, rounded_to=torch.bfloat16)
        return {"class_name": type(self.model).__name__, "fingerprint": fingerprint, **self.normalization}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """The features of patches, [B, N, E] float32, row by row.

        Args:
            images: [B, 3 or 1, height, width] in [-1, 1].
            grid_size: Rows and columns of tokens, N = rows * columns. The images are resized (bicubic, antialiased) to
                this many patches. For an encoder of fixed size they are resized to its size, and its features are
                resized to the grid.

        Raises:
            ValueError: The encoder returns fewer tokens than patches.
        """
        # Device and grid.
        if self.mean.device != images.device:  # once: a copy to an accelerator waits for it
            self.model.to(images.device)
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        grid = grid_size if self.takes_any_size else self.own_grid

        # Resize and normalise.
        size = [side * self.patch_size for side in grid]
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std

        # Features of the patches; class and register tokens come first.
        tokens = self.model(pixel_values=pixels.to(self.dtype), **self.options).last_hidden_state  # B L E
        num_others = tokens.shape[1] - grid[0] * grid[1]
        if num_others < 0:
            raise ValueError(
                f"Expected a token for each of {grid[0]} x {grid[1]} patches, got {tokens.shape[1]} of "
                f"{type(self.model).__name__}. Use a DINOv2, DINOv3, SigLIP or CLIP."
            )

        # To the grid of the denoiser.
        features = tokens[:, num_others:].float()  # B N E
        if grid != tuple(grid_size):
            maps = features.transpose(1, 2).unflatten(2, grid)  # B E rows columns
            maps = F.interpolate(maps, list(grid_size), mode="bilinear", antialias=True)
            features = maps.flatten(2).transpose(1, 2)
        return features
