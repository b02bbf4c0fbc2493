# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Opens training data by name and makes the endless batches of one process, from any position."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import PIL.ImageColor
from torch.utils.data import DataLoader

from .batch_sampler import EpochBatchSampler
from .buckets import BucketBatchSampler, Buckets
from .captions import CaptionColumns
from .labelled_images import DigitsDataset, ImageDataset, collate_images, open_images
from .latents import LatentsDataset, StreamingLatentsDataset, open_latents
from .streaming import StreamingDataset, StreamingImageDataset


TrainingData = DigitsDataset | ImageDataset | StreamingImageDataset | LatentsDataset | StreamingLatentsDataset


def open_training_data(
    dataset_name: str | None = None,
    *,
    train_data_dir: str | None = None,
    latents_dir: str | None = None,
    resolution: int | None = None,
    random_flip: bool = False,
    seed: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    captions: CaptionColumns | None = None,
    buckets: Buckets | None = None,
    background: str = "white",
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    cache_dir: str | None = None,
    **options: Any,
) -> TrainingData:
    """Opens digits, a folder or a repository as images in [-1, 1] with labels or captions, or a folder of latents.

    Args:
        dataset_name: A `datasets` repository. If no data are named, scikit-learn's digits are opened.
        train_data_dir: A folder with one folder of images per class; with captions, a folder with metadata.
        latents_dir: A folder of latents, or a data set of latents on the Hub (see `open_latents`).
        resolution: Side of the images in pixels. It is 8 for digits, known for latents, and the longest side of
            buckets.
        random_flip: Whether to flip images horizontally at random.
        seed: Seed of the flips and of a stream's order.
        image_column: Column with images.
        label_column: Column with class labels.
        captions: Columns with captions; None for class labels.
        buckets: Sizes of the images; None for squares. Latents have the sizes that they were made with.
        background: Colour put behind transparent images, see `load_image`.
        streaming: Whether to read without downloading first.
        shuffle_buffer: Records held in memory to shuffle a stream.
        cache_dir: Where downloads are kept.
        **options: Passed on to `open_images`, which refuses unknown ones.

    Raises:
        ValueError: As for `open_images` and `open_latents`; the resolution is missing, or differs from that of the
            buckets; a bucket has no images; digits or latents do not support an option.
    """
    # Latents.
    if latents_dir is not None:
        given = {"dataset_name": dataset_name, "train_data_dir": train_data_dir, "buckets": buckets, **options}
        given = [name for name, value in given.items() if value is not None]
        if given:
            raise ValueError(f"Expected latents without other data and their options, got {given}. Drop them.")
        dataset = open_latents(
            latents_dir,
            seed=seed,
            random_flip=random_flip,
            captions=captions,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            cache_dir=cache_dir,
        )
        if resolution not in (None, dataset.resolution):
            raise ValueError(
                f"Expected resolution {dataset.resolution}, that of the images behind {latents_dir}, got {resolution}."
            )
        return dataset

    # Digits.
    if dataset_name is None and train_data_dir is None:
        given = {**options, "cache_dir": cache_dir, "captions": captions, "buckets": buckets}
        given = [name for name, value in given.items() if value is not None]
        if streaming or random_flip or given or resolution not in (None, DigitsDataset.resolution):
            raise ValueError(
                "Expected digits at resolution 8, unstreamed, unflipped (a mirrored digit is another sign), got "
                f"resolution={resolution}, streaming={streaming}, random_flip={random_flip} and options {given}. "
                "Drop them, or name data with dataset_name or train_data_dir."
            )
        return DigitsDataset()

    # Images.
    if buckets is not None:
        if resolution not in (None, buckets.resolution):
            raise ValueError(
                f"Expected the buckets' longest side {buckets.resolution} as resolution, or none, got {resolution}."
            )
        resolution = buckets.resolution
    if resolution is None:
        raise ValueError("Expected resolution, the side of the training images in pixels, got none.")
    PIL.ImageColor.getrgb(background)  # raises for an unknown colour
    columns = {"image_column": image_column, "label_column": label_column, "captions": captions}
    source, id2label = open_images(
        dataset_name, train_data_dir=train_data_dir, streaming=streaming, cache_dir=cache_dir, **columns, **options
    )
    common = {"id2label": id2label, "resolution": resolution, "seed": seed, "random_flip": random_flip, **columns}
    common |= {"background": background, "buckets": buckets}
    if streaming:
        return StreamingImageDataset(source, shuffle_buffer=shuffle_buffer, **common)
    return ImageDataset(source, **common)


def make_batches(
    dataset: TrainingData,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    samples_seen: int = 0,
    stream_positions: Sequence[Sequence[Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Makes the endless batches of one process, prepared ahead in a thread.

    With aspect-ratio buckets, all images of a batch have one size, see `BucketBatchSampler` and, for streams,
    `StreamBatches`.

    Args:
        dataset: A data set from `open_training_data`.
        batch_size: B, records per batch and process.
        seed: Seed of the order.
        rank: Rank of this process.
        num_ranks: Number of processes that share the data.
        num_workers: Processes that read and decode, or for a stream, threads that do; 0 for the one thread alone.
        pin_memory: Whether to pin batches, for asynchronous copies to a GPU.
        samples_seen: Number of records that all processes together have had before; not for a stream.
        stream_positions: For a stream, the last `batch["position"]` of each process.

    Raises:
        ValueError: The number of positions is not the number of processes.
    """
    # Streams.
    if isinstance(dataset, StreamingDataset):
        positions = stream_positions or [(0, 0)] * num_ranks
        if len(positions) != num_ranks:
            raise ValueError(f"Expected {len(positions)} processes to go on with this stream, got {num_ranks}.")
        batches = dataset.batches(
            batch_size=batch_size,
            rank=rank,
            num_ranks=num_ranks,
            num_threads=num_workers,
            position=tuple(positions[rank]),
        )
        return _read_ahead(iter(DataLoader(batches, batch_size=None, pin_memory=pin_memory)))

    # Map-style data sets.
    order = {"batch_size": batch_size, "seed": seed, "rank": rank, "num_ranks": num_ranks}
    order["first_sample"] = samples_seen
    bucket_ids = getattr(dataset, "bucket_ids", None)
    sampler = (
        EpochBatchSampler(len(dataset), **order) if bucket_ids is None else BucketBatchSampler(bucket_ids, **order)
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_whole_batch if isinstance(dataset, LatentsDataset) else collate_images,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    return _read_ahead(iter(loader))


def _whole_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the batch as it is: latents are read by the batch and need no collation."""
    return batch


def _read_ahead(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the same batches, of which a thread prepares up to two ahead.

    With `DataLoader` workers alone, each batch is only handed over when it is asked for, which takes about 2 ms.
    """
    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(next, batches) for _ in range(2))
        while True:
            yield ahead.popleft().result()
            ahead.append(reader.submit(next, batches))
