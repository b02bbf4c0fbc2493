# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Stores features of many images on disk, one file per batch: processes share the work, and a kill costs one batch.

    settings.json                  everything the features depend on
    batch-000000.safetensors ...   features [B, D] float32 of one batch, for each output of the extractor

Batch k holds the images k * batch_size to (k + 1) * batch_size - 1 and is written by one process. Features are read in
the order of the images, so that results depend neither on the number of processes nor on interruptions.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..distributed import on_main_process
from ..files import whole, write_json
from ..settings import check_settings
from .feature_statistics import FeatureStatistics


SETTINGS = "settings.json"


class FeatureStore:
    """The features of `num_images` images in a folder that all processes share.

    Args:
        folder: The folder; `claim` creates it if it is missing.
        num_images: Number of images.
        batch_size: Images per file; the last file may have fewer.
        settings: Everything the features depend on (JSON). A folder with other settings is refused.
    """

    def __init__(self, folder: str | Path, *, num_images: int, batch_size: int, settings: dict[str, Any]):
        self.folder, self.num_images, self.batch_size = Path(folder), num_images, batch_size
        settings = settings | {"num_images": num_images, "batch_size": batch_size}
        self.settings = json.loads(json.dumps(settings))

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self.batch_size)

    def rows(self, batch: int) -> range:
        """Indices of the images of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    def claim(self) -> list[int]:
        """Creates the folder or checks its settings, and lists the missing batches; all processes call it together.

        Raises:
            ValueError: The folder holds other features.
        """
        return on_main_process(self._claim)

    def write(self, batch: int, features: dict[str, torch.Tensor]) -> None:
        """Writes one batch atomically.

        Raises:
            ValueError: Features are not finite, or there is not one row per image.
            OSError: The disk is full.
        """
        features = {name: values.detach().float().cpu().contiguous() for name, values in features.items()}
        for name, values in features.items():
            self._check(batch, name, values)
        with whole(self._path(batch)) as temporary:
            safetensors.torch.save_file(features, temporary)

    def num_done(self) -> int:
        """Counts the images whose features are on disk, from all processes."""
        return sum(len(self.rows(batch)) for batch in self._done())

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """Reads one output batch by batch, each [B, D] float32.

        Raises:
            ValueError: A file is damaged or does not hold the features of its batch; the message names it.
        """
        num_features = None
        for batch in range(self.num_batches):
            try:
                with safetensors.safe_open(self._path(batch), "pt") as file:
                    features = file.get_tensor(name)
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(
                    f"Expected a whole file of features, got {self._path(batch)} ({error}). Delete it and run again."
                ) from error
            self._check(batch, name, features, num_features=num_features)
            num_features = features.shape[1]
            yield features

    def statistics(self, name: str, *, extractor: str) -> FeatureStatistics:
        """Computes mean and covariance of one output, in float64."""
        statistics: Any = None
        # Join batches to some thousands of samples first, because merging costs as much as 2 D samples.
        for features in self._joined(name, at_least=4096):
            if statistics is None:
                statistics = FeatureStatistics.from_features(features, extractor=extractor)
            else:
                statistics.update(features)
        return statistics

    def features(self, name: str) -> torch.Tensor:
        """Reads one output of all images, [N, D] float32."""
        return torch.cat(list(self.read(name)))

    def _joined(self, name: str, *, at_least: int) -> Iterator[torch.Tensor]:
        """Reads one output in parts of at least that many rows; the last part may have fewer."""
        parts, num_rows = [], 0
        for features in self.read(name):
            parts.append(features)
            num_rows += len(features)
            if num_rows >= at_least:
                yield torch.cat(parts)
                parts, num_rows = [], 0
        if parts:
            yield torch.cat(parts)

    def _check(self, batch: int, name: str, features: torch.Tensor, *, num_features: int | None = None) -> None:
        rows = self.rows(batch)
        shape = [len(rows), num_features or (features.shape[-1] if features.ndim else 0)]
        if features.dtype != torch.float32 or list(features.shape) != shape or 0 in shape:
            raise ValueError(
                f"Expected {name!r} in {self._path(batch)} as float32 {shape}, got {features.dtype} "
                f"{list(features.shape)}. Delete the file and run again."
            )
        if wrong := [row for row, one in zip(rows, features.isfinite().all(dim=1), strict=True) if not one]:
            raise ValueError(
                f"Expected finite features, got NaN or infinity in {name!r} of images {wrong[:10]} for "
                f"{self._path(batch)}. Look at these images and at the network; delete the file if it is there."
            )

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.safetensors"

    def _done(self) -> set[int]:
        return {int(path.stem.split("-")[1]) for path in self.folder.glob("batch-*.safetensors")}

    def _claim(self) -> list[int]:
        self._check_owner()
        done = self._done()
        return [batch for batch in range(self.num_batches) if batch not in done]

    def _check_owner(self) -> None:
        # Settings of an earlier run.
        path = self.folder / SETTINGS
        if path.exists():
            return check_settings(path, self.settings)

        # Or a new folder.
        if self._done():
            raise ValueError(f"Expected {SETTINGS} beside the features in {self.folder}, got none. Delete the folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, self.settings)
