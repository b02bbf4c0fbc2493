# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Aspect-ratio buckets: the few sizes that images are brought to, and the order of batches of one size."""

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


_ROWS = 64  # that a thread reads at once


@dataclass(frozen=True)
class Buckets:
    """Sizes of training images.

    Args:
        sizes: (height, width) in pixels of each bucket.

    Raises:
        ValueError: No sizes, one twice, or a side below 1.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not self.sizes or len(set(self.sizes)) < len(self.sizes) or min(map(min, self.sizes)) < 1:
            raise ValueError(f"Expected buckets of different sizes, such as 256,256;224,288, got {list(self.sizes)}.")

    @classmethod
    def parse(cls, text: str) -> "Buckets":
        """Buckets as flags name them: "256,256;224,288;288,224", heights first, as in diffusers' scripts.

        Raises:
            ValueError: Another text.
        """
        return cls(tuple(parse_buckets_string(text)))

    @property
    def resolution(self) -> int:
        """The longest side of all."""
        return max(map(max, self.sizes))

    def nearest(self, height: int, width: int) -> int:
        """The index of the bucket for an image, by diffusers' rule: the least `|height * w - width * h|` of all."""
        nearest: Any = find_nearest_bucket(height, width, self.sizes)  # None only of an empty list
        return nearest


def assign_buckets(source, image_column: str, buckets: Buckets) -> np.ndarray:
    """The bucket of each image, read from the headers of the files in threads.

    Images whose header cannot be read go to the largest bucket, where they are met, replaced and reported as other
    unreadable images are.

    Args:
        source: A data set as `open_images` returns it, images undecoded.
        image_column: Its column with images.
        buckets: The sizes that there are.

    Returns:
        [N] int64 indices of buckets.

    Raises:
        ValueError: A bucket without images; the message has the counts.
    """

    def read(start: int) -> list[int]:
        ids = []
        for row, value in enumerate(source[start : start + _ROWS][image_column], start):
            try:
                ids.append(buckets.nearest(*image_size(value, name=f"image {row}")))
            except UnreadableImage:
                ids.append(-1)
        return ids

    starts = range(0, len(source), _ROWS)
    with ThreadPoolExecutor() as pool, tqdm(total=len(source), desc="Reading image sizes", unit="images") as bar:
        bucket_ids = []
        for ids in pool.map(read, starts):
            bucket_ids += ids
            bar.update(len(ids))

    bucket_ids = np.array(bucket_ids)
    counts = np.bincount(bucket_ids[bucket_ids >= 0], minlength=len(buckets.sizes))
    check_buckets(buckets.sizes, counts)
    bucket_ids[bucket_ids < 0] = counts.argmax()
    return bucket_ids


def check_buckets(sizes: tuple[tuple[int, int], ...], counts: np.ndarray) -> None:
    """Raises ValueError if there is a bucket without images."""
    if not counts.all():
        found = ", ".join(f"{count} of {height}x{width}" for (height, width), count in zip(sizes, counts, strict=True))
        raise ValueError(f"Expected images in every aspect-ratio bucket, got {found}. Drop the empty ones.")


class BucketBatchSampler(Sampler):
    """The batches of one rank, all images of a batch of one bucket, endless and with a start anywhere.

    The order of buckets is that of the images of a shuffled data set, one for each global batch: in N batches, N the
    number of images, each bucket comes as often as it has images. Within a bucket an `EpochBatchSampler` gives each
    image once per epoch. So a batch has the same bucket on all ranks, and all follows from the seed and the number
    of samples already seen.

    Args:
        bucket_ids: [N] the bucket of each image of the data set, in [0, number of buckets), none of them empty.
        batch_size: Samples per batch and rank.
        seed: The run's seed.
        rank: This process, in [0, num_ranks).
        num_ranks: Processes that share the data.
        first_sample: The samples that all ranks have already seen: whole batches, a rest counts as none.

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

        # How many batches each bucket has had.
        cycle, start = divmod(self.first_batch, len(self.bucket_ids))
        schedule = self._schedule(cycle)
        had = cycle * sizes + np.bincount(schedule[:start], minlength=len(sizes))
        samplers = [
            iter(EpochBatchSampler(int(size), first_sample=int(batches) * self.total_batch_size, **self.options))
            for size, batches in zip(sizes, had, strict=True)
        ]

        while True:
            for bucket in schedule[start:]:
                yield [(epoch, int(images[bucket][place])) for epoch, place in next(samplers[bucket])]
            cycle, start = cycle + 1, 0
            schedule = self._schedule(cycle)

    def _schedule(self, cycle: int) -> np.ndarray:
        """[N] the buckets of the batches N * cycle to N * (cycle + 1) - 1."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "buckets", cycle))
        return self.bucket_ids[torch.randperm(len(self.bucket_ids), generator=generator).numpy()]
