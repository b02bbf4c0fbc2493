# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Features of a vision encoder, stored with the latents of the images: one feature for each token of a denoiser.

The column `features` of a shard has the features of an image as little-endian bytes, row by row, and the column
`features_flipped` those of the mirrored image.

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
    """Describes the vision encoder of a folder of latents and its stored features.

    Raises:
        ValueError: The dtype does not exist, a number is out of range, or a field has the wrong type.
    """

    encoder: dict[str, Any]
    """`VisionEncoder.identity()`, because the features only fit an alignment with the same encoder."""
    name_or_path: str
    """Name or path from which the encoder was loaded."""
    revision: str | None
    """Commit of the encoder's repository on the Hub; None for a folder."""
    encoder_dtype: str
    """Precision of the encoder."""
    dtype: str
    """Stored precision, "float16" or "bfloat16"."""
    width: int
    """E, the encoder's width."""
    patch_size: int
    """P, the denoiser's patch size: there is one feature for each P x P patch of latents."""

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
        """Shape [N, E] of the features of an image, by the height and width of its latents."""
        height, width = (side // self.patch_size for side in latent_size)
        return height * width, self.width

    def num_bytes(self, height, width):
        """Bytes of the features of one image, by the size of its latents; also for arrays of sizes."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return tokens * self.width * self.torch_dtype.itemsize

    def check_wanted(self, wanted: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the differences, if `LossTerm.stored_features` needs other features."""
        found = {"encoder": self.encoder, "patch_size": self.patch_size}
        if changes := list_changes(found, dict(wanted)):
            raise ValueError(
                f"Expected the encoder and the patches of the features that are stored with these latents "
                f"({self.name_or_path}, patch size {self.patch_size}), got others ({'; '.join(changes)}). Align with "
                "those, make the latents anew with --pretrained_vision_encoder and --features_patch_size, or train on "
                "images."
            )

    def pack(self, features: torch.Tensor, latent_size: Sequence[int]) -> list[bytes]:
        """Converts features [B, N, E] of the stored dtype to a shard's bytes. Raises ValueError for a wrong shape."""
        if tuple(features.shape[1:]) != self.shape(latent_size):
            raise ValueError(f"Expected features {list(self.shape(latent_size))}, got {list(features.shape[1:])}.")
        return [to_bytes(values) for values in features]

    def unpack(self, column, latent_size: Sequence[int]) -> torch.Tensor:
        """Copies an Arrow column of n records to features [n, N, E] of the stored dtype."""
        shape = self.shape(latent_size)
        values = np.empty((len(column), shape[0] * shape[1]), np.uint16)
        for row, content in zip(values, column, strict=True):
            row[:] = np.frombuffer(content.as_buffer(), np.uint16)
        return torch.from_numpy(values).view(self.torch_dtype).unflatten(1, shape)


class FeatureReading:
    """Shared by memory-mapped and streamed data sets of latents: reading of features on request."""

    reads_features = False

    def with_features(self):
        """Returns the data set with a vision encoder's features, which cost more to read than the latents.

        Raises:
            ValueError: There are no stored features.
        """
        if self.info.patch_features is None:
            raise ValueError(
                "Expected latents with a vision encoder's features, got none. Make them with "
                "examples/precompute_latents.py --pretrained_vision_encoder."
            )
        dataset = copy.copy(self)
        dataset.reads_features = True
        return dataset
