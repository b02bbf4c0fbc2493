# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Batches from a streamed `datasets.IterableDataset`, with a position from which a later run can go on."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from .images import collate_images, read_image
from .sampling import derive_seed


class StreamingImageDataset:
    """The images and labels of a streamed data set, shuffled by a buffer with another seed in each epoch.

    Args:
        source: A data set as `open_images` returns it with `streaming=True`.
        image_column: Its column with images.
        label_column: Its column with class labels.
        id2label: Names of the classes.
        resolution: R; images are cropped and resized to R x R.
        seed: The run's seed.
        random_flip: Whether to flip images at random.
        shuffle_buffer: Records that the shuffle holds in memory.
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
        seed: int,
        random_flip: bool = False,
        shuffle_buffer: int = 1000,
    ):
        self.source = source.shuffle(seed=derive_seed(seed, "stream") % 2**32, buffer_size=shuffle_buffer)
        self.image_column, self.label_column = image_column, label_column
        self.id2label, self.num_classes = id2label, len(id2label)
        self.resolution, self.seed, self.random_flip = resolution, seed, random_flip

    def batches(
        self,
        *,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        num_threads: int = 0,
        position: tuple[int, int] = (0, 0),
    ) -> "StreamBatches":
        """The endless batches of one rank, as a torch data set of whole batches (`DataLoader(batch_size=None)`).

        Args:
            batch_size: B, images per batch and rank.
            rank: This process.
            num_ranks: Processes that share the stream.
            num_threads: Threads that decode, while one more reads ahead; 0 does all when a batch is asked for.
            position: (epoch, records of this rank used in it) to start at, as `batch["position"]` gave it.
        """
        return StreamBatches(
            self, batch_size=batch_size, rank=rank, num_ranks=num_ranks, num_threads=num_threads, position=position
        )


class StreamBatches(IterableDataset):
    """See `StreamingImageDataset.batches`.

    A stream has no random access: starting at a position reads, without decoding, all records of this rank before it
    in the epoch. Not for `DataLoader` workers: `datasets` gives them other orders than the main process, and several
    would have no common position. Reading ahead and decoding run in threads instead.

    Raises:
        ValueError: While reading: a label outside [0, num_classes), no record, an epoch without a readable image.
    """

    def __init__(self, images: StreamingImageDataset, *, batch_size, rank, num_ranks, num_threads, position):
        from datasets.distributed import split_dataset_by_node

        self.images, self.source = images, split_dataset_by_node(images.source, rank=rank, world_size=num_ranks)
        self.batch_size, self.rank, self.num_threads, self.position = batch_size, rank, num_threads, position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.num_threads == 0:
            yield from self._batches()
        batches = self._batches()
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(next, batches) for _ in range(2))
            while True:
                yield ahead.popleft().result()
                ahead.append(reader.submit(next, batches))

    def _batches(self) -> Iterator[dict[str, Any]]:
        records, last_good_epoch = self._records(), self.position[0]
        with ThreadPoolExecutor(max(self.num_threads, 1)) as pool:
            while True:
                items, corrupt = [], []
                while len(items) < self.batch_size:
                    # Only as many records as the batch still needs: the position then says exactly what was used.
                    for item in list(pool.map(self._read, islice(records, self.batch_size - len(items)))):
                        position = (item["epoch"], item["place"] + 1)
                        if item["pixel_values"] is None:
                            corrupt.append(item["name"])
                        else:
                            items.append(item)
                            last_good_epoch = item["epoch"]
                        if item["epoch"] > last_good_epoch + 1:
                            raise ValueError("Expected at least one readable image per epoch, got none.")
                yield collate_images(items) | {"corrupt": corrupt, "position": position}

    def _records(self) -> Iterator[dict[str, Any]]:
        """This rank's undecoded records from the start position on, epoch after epoch."""
        epoch, start = self.position
        while True:
            self.source.set_epoch(epoch)
            place = -1
            for place, record in enumerate(self.source):
                if place >= start:
                    yield {"epoch": epoch, "place": place, "record": record}
            if place < 0:
                raise ValueError("Expected at least one record per process in the stream, got none.")
            epoch, start = epoch + 1, 0

    def _read(self, item: dict[str, Any]) -> dict[str, Any]:
        images, record = self.images, item["record"]
        label, image = record[images.label_column], record[images.image_column]
        if not isinstance(label, int) or not 0 <= label < images.num_classes:
            raise ValueError(
                f"Expected integer labels in [0, {images.num_classes}), got {label!r} in column "
                f"{images.label_column!r}."
            )
        draw = derive_seed(images.seed, "flip", self.rank, item["epoch"], item["place"])
        pixels = read_image(image, resolution=images.resolution, flip=images.random_flip and draw % 2 == 1)
        name = image.get("path") or f"record {item['place']} of epoch {item['epoch']}"
        return item | {"pixel_values": pixels, "class_labels": label, "corrupt": [], "name": name}
