# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Batches from a streamed `datasets.IterableDataset`, with a position from which a run can be resumed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from ..hub_errors import LOST
from ..seeds import derive_seed
from .buckets import Buckets
from .captions import CaptionColumns
from .images import UnreadableImage, fetch, image_size, load_record
from .labelled_images import collate_images


class StreamingDataset:
    """A streamed data set with labels or captions, shuffled by a buffer with another seed in each epoch.

    A subclass defines how a record is read, and `channels`.

    Args:
        source: A streamed `datasets` data set.
        id2label: Names of the classes; {} with captions.
        resolution: R, side of the images in pixels; with buckets, their longest side.
        seed: The run's seed.
        random_flip: Whether to flip images at random.
        shuffle_buffer: Records held in memory to shuffle the stream.
    """

    value: str
    """Key of the image or latents in an item and in a batch."""

    def __init__(
        self,
        source,
        *,
        id2label: dict[int, str],
        resolution: int,
        seed: int,
        random_flip: bool = False,
        shuffle_buffer: int = 1000,
    ):
        self.source = source.shuffle(seed=derive_seed(seed, "stream") % 2**32, buffer_size=shuffle_buffer)
        self.id2label, self.num_classes = id2label, len(id2label)
        self.resolution, self.seed, self.random_flip = resolution, seed, random_flip

    def records(self, source) -> Iterator[Any]:
        """Yields the undecoded records of one epoch of `source`, which is one rank's part of the stream."""
        return iter(source)

    def read(self, record, *, name: str, flip: bool) -> dict[str, Any]:
        """Reads an item: its value and `class_labels`. If unreadable, its value is None and `corrupt` says why."""
        raise NotImplementedError

    def read_caption(self, record, *, epoch: int, place: int, rank: int) -> dict[str, Any]:
        """Draws the caption for this use of the record, for data sets with captions; it is added to the item."""
        return {}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates items whose values have the same shape to a batch."""
        raise NotImplementedError

    def batches(
        self,
        *,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        num_threads: int = 0,
        position: tuple[Any, ...] = (0, 0),
    ) -> "StreamBatches":
        """The endless batches of one rank, as a torch data set of whole batches (`DataLoader(batch_size=None)`).

        Args:
            batch_size: B, records per batch and rank.
            rank: Rank of this process.
            num_ranks: Number of processes that share the stream.
            num_threads: Threads that decode; 0 decodes in the thread that asks for the batch.
            position: Where to start, from `batch["position"]`: the epoch, the number of records of this rank already
                read in it, and then a pair (epoch, place) for each earlier record that still waits for others of its
                size.
        """
        return StreamBatches(
            self, batch_size=batch_size, rank=rank, num_ranks=num_ranks, num_threads=num_threads, position=position
        )


class StreamingImageDataset(StreamingDataset):
    """The images of a streamed data set with their labels or captions.

    Args:
        source: A data set from `open_images` with `streaming=True`.
        image_column: Its column with images.
        label_column: Its column with class labels; not read with captions.
        captions: Its columns with captions; None for class labels.
        buckets: Sizes of the images; None for R x R.
        background: Colour put behind transparent images, see `load_image`.
        **options: See `StreamingDataset`.
    """

    value, channels = "pixel_values", 3

    def __init__(
        self,
        source,
        *,
        image_column: str,
        label_column: str,
        captions: CaptionColumns | None = None,
        buckets: Buckets | None = None,
        background: str = "white",
        **options: Any,
    ):
        super().__init__(source, **options)
        self.image_column, self.label_column, self.captions = image_column, label_column, captions
        self.buckets, self.background = buckets, background

    def read(self, record: dict[str, Any], *, name: str, flip: bool) -> dict[str, Any]:
        name = record.get("__key__", name)
        item = {"pixel_values": None, "corrupt": []}
        if self.captions is None:
            item["class_labels"] = record[self.label_column]
        try:
            image, size = record[self.image_column], self.resolution
            if self.buckets is not None:
                content, path = fetch(image)  # fetch a remote file only once
                image = {"bytes": content, "path": path} if isinstance(content, bytes) else image
                size = self.buckets.sizes[self.buckets.nearest(*image_size(image, name=name))]
            item["pixel_values"] = load_record(
                image, name=name, resolution=size, flip=flip, background=self.background
            )
        except UnreadableImage as error:
            item["corrupt"] = [str(error)]
        return item

    def read_caption(self, record: dict[str, Any], **place: int) -> dict[str, Any]:
        return {} if self.captions is None else {"caption": self.captions.choose(record, seed=self.seed, **place)}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate_images(items)


class StreamBatches(IterableDataset):
    """Iterates over the batches of one rank, see `StreamingDataset.batches`.

    Records wait until there are enough of one size for a batch, also beyond the end of an epoch. Without aspect-ratio
    buckets, no record is left waiting. With them, up to B - 1 decoded images of each size wait in memory, and ranks
    may have batches of different sizes at the same step.

    A stream has no random access: to start at a position, all earlier records of this rank in the epoch are read
    without decoding, and so are earlier epochs from which records still wait. Do not use `DataLoader` workers:
    `datasets` gives them another order than the main process, and several workers have no common position. Threads
    decode instead, and `make_batches` reads ahead in another thread.

    Raises:
        ValueError: While reading: a label is outside [0, num_classes); a record has no caption; there are no records;
            an epoch has no readable image.
        ConnectionError: While reading: the connection was lost, and the retries of `datasets` and huggingface_hub
            failed.
    """

    def __init__(self, dataset: StreamingDataset, *, batch_size, rank, num_ranks, num_threads, position):
        from datasets.distributed import split_dataset_by_node

        self.dataset, self.source = dataset, split_dataset_by_node(dataset.source, rank=rank, world_size=num_ranks)
        self.batch_size, self.rank, self.num_threads, self.position = batch_size, rank, num_threads, position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}  # by shape
        corrupt, last_good_epoch = [], self.position[0]
        for item in self._items():
            # Skip what cannot be read.
            if (value := item[self.dataset.value]) is None:
                corrupt += item["corrupt"]
                if item["epoch"] > last_good_epoch + 1:
                    raise ValueError("Expected at least one readable record per epoch, got none.")
                continue

            # A batch, as soon as there are enough items of one shape.
            last_good_epoch = max(item["epoch"], last_good_epoch)
            items = waiting.setdefault(tuple(value.shape), [])
            items.append(item)
            if len(items) == self.batch_size:
                del waiting[tuple(value.shape)]
                places = sorted((other["epoch"], other["place"]) for others in waiting.values() for other in others)
                position = (item["epoch"], item["place"] + 1, *places)
                yield self.dataset.collate(items) | {"corrupt": corrupt, "position": position}
                corrupt = []

    def _items(self) -> Iterator[dict[str, Any]]:
        """This rank's items, decoded a batch at a time."""
        records = self._records()
        with ThreadPoolExecutor(max(self.num_threads, 1)) as pool:
            read_all = pool.map if self.num_threads > 0 else map
            while True:
                yield from read_all(self._read, list(islice(records, self.batch_size)))

    def _records(self) -> Iterator[dict[str, Any]]:
        """This rank's undecoded records: first those that still wait, then all from the start position on."""
        *start, waiting = (*self.position[:2], {(epoch, place) for epoch, place in self.position[2:]})
        for epoch in count(min([start[0], *(epoch for epoch, _ in waiting)])):
            # Earlier epochs are only read if records of them wait.
            places = {place for its_epoch, place in waiting if its_epoch == epoch}
            if epoch < start[0] and not places:
                continue

            # Read the epoch.
            self.source.set_epoch(epoch)
            place = -1
            try:
                for place, record in enumerate(self.dataset.records(self.source)):
                    if place in places or (epoch, place) >= tuple(start):
                        yield {"epoch": epoch, "place": place, "record": record}
                    elif epoch < start[0] and place >= max(places):
                        break
            except LOST as error:
                raise _lost(f"record {place + 1} of epoch {epoch}", error) from error
            if place < 0:
                raise ValueError("Expected at least one record per process in the stream, got none.")

    def _read(self, item: dict[str, Any]) -> dict[str, Any]:
        dataset, epoch, place = self.dataset, item["epoch"], item["place"]
        draw = derive_seed(dataset.seed, "flip", self.rank, epoch, place)
        name = f"record {place} of epoch {epoch}"
        record = item.pop("record")

        # Image or latents, and caption.
        try:
            read = dataset.read(record, name=name, flip=dataset.random_flip and draw % 2 == 1)
        except LOST as error:
            raise _lost(name, error) from error
        read |= dataset.read_caption(record, epoch=epoch, place=place, rank=self.rank)

        # Label.
        if "class_labels" in read:
            if not isinstance(label := read["class_labels"], int) or not 0 <= label < dataset.num_classes:
                raise ValueError(f"Expected integer labels in [0, {dataset.num_classes}), got {label!r} for {name}.")
        return {"corrupt": []} | item | read


def _lost(place: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"Expected to go on reading at {place}, lost the source. When it can be reached again, the same command goes "
        f"on from the last checkpoint. The cause: {error}"
    )
