# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a vision encoder makes of images, stored beside their latents: a feature for each token of a denoiser.

A shard has the features of an image as bytes, little-endian, row by row, in its column `features`, and those of the
mirrored image in `features_flipped`.

Shapes: B batch, h and w latent size, P patch size, N = (h / P) * (w / P) tokens, E the encoder's width.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...settings import list_changes
from .text import MAX_VALUES, is_count, to_bytes


DTYPES = ("float16", "bfloat16")
COLUMNS = ("features", "features_flipped")


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """What encoded the images of a folder of latents, and what of that is stored.

    Raises:
        ValueError: A dtype that does not exist, a number out of range, a field of another type.
    """

    encoder: dict[str, Any]
    """`VisionEncoder.identity()`: an alignment with another encoder would not fit."""
    name_or_path: str
    """Where the encoder lay."""
    revision: str | None
    """Its commit, of a repository of the Hub."""
    encoder_dtype: str
    """What the encoder computed in."""
    dtype: str
    """"float16" or "bfloat16", what is stored."""
    width: int
    """E."""
    patch_size: int
    """P, that of the denoiser: a feature is of P x P latents."""

    def __post_init__(self):
        if not isinstance(self.encoder, dict) or not self.encoder:
            raise ValueError(f"Expected an encoder of the features, got {self.encoder!r}.")
        for name in ("name_or_path", "encoder_dtype", *(["revision"] if self.revision is not None else [])):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Expected text as {name} of the features, got {getattr(self, name)!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Expected dtype {' or '.join(DTYPES)} of the features, got {self.dtype!r}.")
        for name in ("width", "patch_size"):
            if not is_count(getattr(self, name)) or getattr(self, name) > MAX_VALUES:
                raise ValueError(f"Expected an integer {name} >= 1 of the features, got {getattr(self, name)!r}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def shape(self, latent_size: Sequence[int]) -> tuple[int, int]:
        """[N, E] of latents of a height and a width."""
        height, width = (side // self.patch_size for side in latent_size)
        return height * width, self.width

    def num_bytes(self, height, width):
        """Of one image with latents of that size; also of arrays of sizes."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return tokens * self.width * self.torch_dtype.itemsize

    def check_wanted(self, wanted: Mapping[str, Any]) -> None:
        """Raises ValueError, with what differs, where `LossTerm.stored_features` wants others."""
        found = {"encoder": self.encoder, "patch_size": self.patch_size}
        if changes := list_changes(found, dict(wanted)):
            raise ValueError(
                f"Expected the encoder and the patches of the features that are stored with these latents "
                f"({self.name_or_path}, patch size {self.patch_size}), got others ({'; '.join(changes)}). Align with "
                "those, make the latents anew with --pretrained_vision_encoder and --features_patch_size, or train on "
                "images."
            )

    def pack(self, features: torch.Tensor, latent_size: Sequence[int]) -> list[bytes]:
        """[B, N, E] of the stored dtype as a shard has them. Raises ValueError for another shape."""
        if tuple(features.shape[1:]) != self.shape(latent_size):
            raise ValueError(f"Expected features {list(self.shape(latent_size))}, got {list(features.shape[1:])}.")
        return [to_bytes(values) for values in features]

    def unpack(self, column, latent_size: Sequence[int]) -> torch.Tensor:
        """[n, N, E] of the stored dtype, copied, of an Arrow column of n records."""
        shape = self.shape(latent_size)
        values = np.empty((len(column), shape[0] * shape[1]), np.uint16)
        for row, content in zip(values, column, strict=True):
            row[:] = np.frombuffer(content.as_buffer(), np.uint16)
        return torch.from_numpy(values).view(self.torch_dtype).unflatten(1, shape)


class FeatureReading:
    """What data sets of latents have in common, memory-mapped and streamed."""

    reads_features = False

    def with_features(self):
        """The same records with a vision encoder's features, which cost more to read than the latents.

        Raises:
            ValueError: There are none.
        """
        if self.info.patch_features is None:
            raise ValueError(
                "Expected latents with a vision encoder's features, got none. Make them with "
                "examples/precompute_latents.py --pretrained_vision_encoder."
            )
        dataset = copy.copy(self)
        dataset.reads_features = True
        return dataset
