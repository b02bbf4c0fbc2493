# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Aspect-ratio buckets: the sizes to which images are cropped and resized, and batches of images of one size."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket, parse_buckets_string
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from ..seeds import derive_seed
from .batch_sampler import EpochBatchSampler
from .images import UnreadableImage, image_size


_ROWS = 64  # rows that a thread reads at once


@dataclass(frozen=True)
class Buckets:
    """Sizes of training images.

    Args:
        sizes: (height, width) of each bucket, in pixels.

    Raises:
        ValueError: There are no sizes, a size occurs twice, or a side is below 1.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not self.sizes or len(set(self.sizes)) < len(self.sizes) or min(map(min, self.sizes)) < 1:
            raise ValueError(f"Expected buckets of different sizes, such as 256,256;224,288, got {list(self.sizes)}.")

    @classmethod
    def parse(cls, text: str) -> "Buckets":
        """Parses the text of a flag, such as "256,256;224,288;288,224", heights first, as in diffusers' scripts.

        Raises:
            ValueError: The text has another format.
        """
        return cls(tuple(parse_buckets_string(text)))

    @property
    def resolution(self) -> int:
        """The longest side of all buckets, in pixels."""
        return max(map(max, self.sizes))

    def nearest(self, height: int, width: int) -> int:
        """The index of the bucket for an image, by diffusers' rule: the least `|height * w - width * h|`."""
        nearest: Any = find_nearest_bucket(height, width, self.sizes)  # None only for an empty list
        return nearest


def assign_buckets(source, image_column: str, buckets: Buckets) -> np.ndarray:
    """Finds the bucket of each image from the headers of the files, read in threads.

    Images whose header cannot be read go to the bucket with the most images. During training they are replaced and
    reported like other unreadable images.

    Args:
        source: A data set from `open_images`, with undecoded images.
        image_column: Its column with images.
        buckets: The available sizes.

    Returns:
        Indices of buckets, shape [N], int64.

    Raises:
        ValueError: A bucket has no images; the message gives the counts.
    """

    def read(start: int) -> list[int]:
        ids = []
        for row, value in enumerate(source[start : start + _ROWS][image_column], start):
            try:
                ids.append(buckets.nearest(*image_size(value, name=f"image {row}")))
            except UnreadableImage:
                ids.append(-1)
        return ids

    # Read headers.
    starts = range(0, len(source), _ROWS)
    with ThreadPoolExecutor() as pool, tqdm(total=len(source), desc="Reading image sizes", unit="images") as bar:
        bucket_ids = []
        for ids in pool.map(read, starts):
            bucket_ids += ids
            bar.update(len(ids))

    # Unreadable images go to the bucket with the most images.
    bucket_ids = np.array(bucket_ids)
    counts = np.bincount(bucket_ids[bucket_ids >= 0], minlength=len(buckets.sizes))
    check_buckets(buckets.sizes, counts)
    bucket_ids[bucket_ids < 0] = counts.argmax()
    return bucket_ids


def check_buckets(sizes: tuple[tuple[int, int], ...], counts: np.ndarray) -> None:
    """Raises ValueError if a bucket has no images."""
    if not counts.all():
        found = ", ".join(f"{count} of {height}x{width}" for (height, width), count in zip(sizes, counts, strict=True))
        raise ValueError(f"Expected images in every aspect-ratio bucket, got {found}. Drop the empty ones.")


class BucketBatchSampler(Sampler):
    """Yields the batches of one rank, each with images of one bucket: an endless pass that can start at any batch.

    Each global batch takes the bucket of the next image of a shuffled data set. So in N batches, with N the number of
    images, each bucket comes as often as it has images. Within a bucket, an `EpochBatchSampler` takes each image once
    per epoch. A batch has the same bucket on all ranks, and everything depends only on the seed and the number of
    samples already seen.

    Args:
        bucket_ids: Bucket of each image of the data set, shape [N], in [0, number of buckets); no bucket is empty.
        batch_size: Samples per batch and rank.
        seed: The run's seed.
        rank: Rank of this process, in [0, num_ranks).
        num_ranks: Number of processes that share the data.
        first_sample: Number of samples that all ranks have already seen, rounded down to whole batches.

    Yields:
        Lists of `batch_size` pairs (epoch of the bucket, index in the data set).
    """

    def __init__(
        self,
        bucket_ids: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        first_sample: int = 0,
    ):
        self.bucket_ids, self.seed, self.total_batch_size = bucket_ids, seed, batch_size * num_ranks
        self.first_batch = first_sample // self.total_batch_size
        self.options = {"batch_size": batch_size, "seed": seed, "rank": rank, "num_ranks": num_ranks}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sizes = np.bincount(self.bucket_ids)
        images = [np.flatnonzero(self.bucket_ids == bucket) for bucket in range(len(sizes))]

        # How many batches each bucket has had so far.
        cycle, start = divmod(self.first_batch, len(self.bucket_ids))
        schedule = self._schedule(cycle)
        had = cycle * sizes + np.bincount(schedule[:start], minlength=len(sizes))
        samplers = [
            iter(EpochBatchSampler(int(size), first_sample=int(batches) * self.total_batch_size, **self.options))
            for size, batches in zip(sizes, had, strict=True)
        ]

        # Batches from there on.
        while True:
            for bucket in schedule[start:]:
                yield [(epoch, int(images[bucket][place])) for epoch, place in next(samplers[bucket])]
            cycle, start = cycle + 1, 0
            schedule = self._schedule(cycle)

    def _schedule(self, cycle: int) -> np.ndarray:
        """The buckets of the batches N * cycle to N * (cycle + 1) - 1, shape [N]."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "buckets", cycle))
        return self.bucket_ids[torch.randperm(len(self.bucket_ids), generator=generator).numpy()]
