# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Batches from a streamed `datasets.IterableDataset`, with a position from which a later run can go on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from .images import collate_images, read_image
from .sampling import derive_seed


class StreamingImageDataset(IterableDataset):
    """The endless batches of one rank; batches are whole, so a `DataLoader` takes it with `batch_size=None`.

    Each epoch is shuffled by a buffer with a seed of its own. A stream has no random access: starting at a position
    reads, but does not decode, all records of that epoch before it.

    Use it with at most one `DataLoader` worker: several would read the stream in an order that depends on their speed.
    Decoding runs in threads instead.

    Args:
        source: A data set as `open_images` returns it with `streaming=True`.
        image_column: Its column with images.
        label_column: Its column with class labels.
        id2label: Names of the classes.
        resolution: R; images are cropped and resized to R x R.
        batch_size: B, images per batch and rank.
        seed: The run's seed.
        random_flip: Whether to flip images at random.
        shuffle_buffer: Records that the shuffle holds in memory.
        num_threads: Threads that decode.
        rank: This process.
        num_ranks: Processes that share the stream.
        position: (epoch, records of this rank already used) to start at, as `batch["position"]` gave it.

    Raises:
        ValueError: While reading: a label outside [0, num_classes), an epoch without a readable image.
    """

    channels = 3

    def __init__(
        self,
        source,
        *,
        image_column: str,
        label_column: str,
        id2label: dict[int, str],
        resolution: int,
        batch_size: int,
        seed: int,
        random_flip: bool = False,
        shuffle_buffer: int = 1000,
        num_threads: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        position: tuple[int, int] = (0, 0),
    ):
        from datasets.distributed import split_dataset_by_node

        source = source.shuffle(seed=derive_seed(seed, "stream") % 2**32, buffer_size=shuffle_buffer)
        self.source = split_dataset_by_node(source, rank=rank, world_size=num_ranks)
        self.image_column, self.label_column = image_column, label_column
        self.id2label, self.num_classes = id2label, len(id2label)
        self.resolution, self.batch_size, self.seed = resolution, batch_size, seed
        self.random_flip, self.num_threads, self.rank = random_flip, num_threads, rank
        self.position = tuple(position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        records, last_good_epoch = self._records(), self.position[0]
        with ThreadPoolExecutor(self.num_threads) as pool:
            while True:
                items, corrupt = [], []
                while len(items) < self.batch_size:
                    # Only as many records as the batch still needs: the position then says exactly what was used.
                    chunk = list(islice(records, self.batch_size - len(items)))
                    for record, item in zip(chunk, pool.map(self._read, chunk), strict=True):
                        if item["pixel_values"] is None:
                            corrupt.append(item["name"])
                        else:
                            items.append(item)
                            last_good_epoch = record["epoch"]
                        if record["epoch"] > last_good_epoch + 1:
                            raise ValueError("Expected at least one readable image per epoch, got none.")
                        position = (record["epoch"], record["place"] + 1)
                yield collate_images(items) | {"corrupt": corrupt, "position": position}

    def _records(self) -> Iterator[dict[str, Any]]:
        """This rank's undecoded records from the start position on, epoch after epoch."""
        epoch, start = self.position
        while True:
            self.source.set_epoch(epoch)
            place = -1
            for place, record in enumerate(self.source):
                if place >= start:
                    yield {"epoch": epoch, "place": place, **self._check(record)}
            if place < 0:
                raise ValueError("Expected at least one record per process in the stream, got an empty stream.")
            epoch, start = epoch + 1, 0

    def _check(self, record: dict[str, Any]) -> dict[str, Any]:
        label = record[self.label_column]
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"Expected integer labels in [0, {self.num_classes}), got {label!r} in column {self.label_column!r}."
            )
        return {"image": record[self.image_column], "label": label}

    def _read(self, record: dict[str, Any]) -> dict[str, Any]:
        draw = derive_seed(self.seed, "flip", self.rank, record["epoch"], record["place"])
        pixels = read_image(record["image"], resolution=self.resolution, flip=self.random_flip and draw % 2 == 1)
        name = record["image"].get("path") or f"record {record['place']} of epoch {record['epoch']}"
        return {"pixel_values": pixels, "class_labels": record["label"], "corrupt": [], "name": name}
