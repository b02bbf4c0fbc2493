# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From the name of some data to the endless batches of one process, starting anywhere."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from .images import DigitsDataset, ImageDataset, collate_images, open_images
from .sampling import EpochBatchSampler
from .streaming import StreamingImageDataset


def open_training_data(
    dataset_name: str | None = None,
    *,
    train_data_dir: str | None = None,
    resolution: int | None = None,
    random_flip: bool = False,
    seed: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    **options: Any,
) -> DigitsDataset | ImageDataset | StreamingImageDataset:
    """Digits, a folder or a repository as images in [-1, 1] with labels.

    Args:
        dataset_name: A `datasets` repository; without it and `train_data_dir`, scikit-learn's digits.
        train_data_dir: A folder with one sub-folder of images per class.
        resolution: Side of the images in pixels; the digits have 8.
        random_flip: Whether to flip images horizontally at random.
        seed: Of the flips and of a stream's order.
        image_column: Column with images.
        label_column: Column with class labels.
        streaming: Whether to read without downloading first.
        shuffle_buffer: Records that the shuffle of a stream holds in memory.
        **options: Handed to `open_images`, which refuses unknown ones.

    Raises:
        ValueError: What `open_images` refuses; no resolution; options that the digits do not have.
    """
    if dataset_name is None and train_data_dir is None:
        given = [name for name, value in options.items() if value is not None]
        if streaming or random_flip or given or resolution not in (None, DigitsDataset.resolution):
            raise ValueError(
                "Expected digits at resolution 8, unstreamed, unflipped (a mirrored digit is another sign), got "
                f"resolution={resolution}, streaming={streaming}, random_flip={random_flip} and options {given}. "
                "Drop them, or name data with dataset_name or train_data_dir."
            )
        return DigitsDataset()

    if resolution is None:
        raise ValueError("Expected resolution, the side of the training images in pixels, got none.")
    columns = {"image_column": image_column, "label_column": label_column}
    source, id2label = open_images(
        dataset_name, train_data_dir=train_data_dir, streaming=streaming, **columns, **options
    )
    common = {"id2label": id2label, "resolution": resolution, "seed": seed, "random_flip": random_flip, **columns}
    if streaming:
        return StreamingImageDataset(source, shuffle_buffer=shuffle_buffer, **common)
    return ImageDataset(source, **common)


def make_batches(
    dataset: DigitsDataset | ImageDataset | StreamingImageDataset,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    samples_seen: int = 0,
    stream_positions: Sequence[tuple[int, int]] | None = None,
) -> Iterator[dict[str, Any]]:
    """The endless batches of one process.

    Args:
        dataset: As `open_training_data` gives it.
        batch_size: B, images per batch and process.
        seed: Of the order.
        rank: This process.
        num_ranks: Processes that share the data.
        num_workers: Processes that decode; for a stream threads of this one.
        pin_memory: Whether to pin batches, for copies to a GPU that nothing waits for.
        samples_seen: Images that all processes together have had before; not for a stream.
        stream_positions: For a stream, each process's last `batch["position"]`.

    Raises:
        ValueError: There are positions for another number of processes.
    """
    if isinstance(dataset, StreamingImageDataset):
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
        return iter(DataLoader(batches, batch_size=None, pin_memory=pin_memory))

    sampler = EpochBatchSampler(
        len(dataset), batch_size=batch_size, seed=seed, rank=rank, num_ranks=num_ranks, first_sample=samples_seen
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_images,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    return iter(loader)
