# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From the name of some data to the endless batches of one process, starting anywhere."""

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
    """Digits, a folder or a repository as images in [-1, 1] with labels or captions, or as latents of them.

    Args:
        dataset_name: A `datasets` repository; without any data named, scikit-learn's digits.
        train_data_dir: A folder with one folder of images per class; with captions one with metadata.
        latents_dir: A folder of latents, or a data set on the Hub that is one (see `open_latents`).
        resolution: Side of the images in pixels; the digits have 8, latents know it, and with buckets it is their
            longest side.
        random_flip: Whether to flip images horizontally at random.
        seed: Of the flips and of a stream's order.
        image_column: Column with images.
        label_column: Column with class labels.
        captions: Columns with captions; None for class labels.
        buckets: Sizes of the images; None for squares. Latents have the sizes that they were made with.
        background: Colour behind transparent images, see `load_image`.
        streaming: Whether to read without downloading first.
        shuffle_buffer: Records that the shuffle of a stream holds in memory.
        cache_dir: Where downloads are kept.
        **options: Handed to `open_images`, which refuses unknown ones.

    Raises:
        ValueError: What `open_images` or `open_latents` refuses; no resolution, or one that is not that of the
            buckets; a bucket without images; options that the digits or latents do not have.
    """
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
    """The endless batches of one process, made ahead in a thread so that they are ready when asked for.

    With aspect-ratio buckets a batch has one size, see `BucketBatchSampler` and, for streams, `StreamBatches`.

    Args:
        dataset: As `open_training_data` gives it.
        batch_size: B, records per batch and process.
        seed: Of the order.
        rank: This process.
        num_ranks: Processes that share the data.
        num_workers: Processes that decode and read, 0 for the thread alone; for a stream threads of this process.
        pin_memory: Whether to pin batches, for copies to a GPU that nothing waits for.
        samples_seen: Records that all processes together have had before; not for a stream.
        stream_positions: For a stream, each process's last `batch["position"]`.

    Raises:
        ValueError: There are positions for another number of processes.
    """
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
    """Latents are read by the batch and need no collation."""
    return batch


def _read_ahead(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches, made by a thread up to two before they are asked for.

    Workers of a `DataLoader` alone leave the hand-over of each batch, about 2 ms, to the moment when it is asked for.
    """
    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(next, batches) for _ in range(2))
        while True:
            yield ahead.popleft().result()
            ahead.append(reader.submit(next, batches))
