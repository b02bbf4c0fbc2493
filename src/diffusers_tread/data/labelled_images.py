# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images with labels or captions: scikit-learn's digits, a folder or any `datasets` repository, as tensors in [-1, 1].

Shapes: B batch, C channels, H and W image size, R resolution. A batch is {"pixel_values": [B, C, H, W] float32,
"class_labels": [B] int64 or "captions": list of B texts, "corrupt": names of the unreadable images that were replaced
in it}. H = W = R without aspect-ratio buckets.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..hub_errors import ADVICE, LOST
from ..installation import require
from ..seeds import derive_seed
from .buckets import Buckets, assign_buckets
from .captions import CaptionColumns
from .folders import ClassFolders, find_metadata, list_class_folders
from .images import UnreadableImage, load_record


def collate_images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates items of one of the data sets below to a batch."""
    batch = {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "corrupt": [image for item in items for image in item["corrupt"]],
    }
    if "caption" in items[0]:
        return batch | {"captions": [item["caption"] for item in items]}
    return batch | {"class_labels": torch.tensor([item["class_labels"] for item in items], dtype=torch.int64)}


class DigitsDataset(Dataset):
    """The 1,797 handwritten digits of scikit-learn: 8x8 pixels, one channel, ten classes, no download.

    It is indexed like `ImageDataset`.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    num_classes, channels, resolution = 10, 1, 8

    def __init__(self):
        require("train", "sklearn")
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # 0..16 to [-1, 1]
        self.labels = torch.from_numpy(digits.target).long()
        self.id2label = {label: str(name) for label, name in enumerate(digits.target_names)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        _, index = key
        return {"pixel_values": self.images[index], "class_labels": int(self.labels[index]), "corrupt": []}


class ImageDataset(Dataset):
    """The images of a map-style `datasets.Dataset` with their labels or captions.

    The key of an item is (epoch, index), because flip and caption depend on both. An unreadable image is replaced by
    the next readable one of its bucket and reported in the item's `corrupt`.

    Args:
        source: A data set from `open_images`, with undecoded images.
        image_column: Its column with images.
        label_column: Its column with class labels, as integers; not read with captions.
        captions: Its columns with captions; None for class labels.
        id2label: Names of the classes; {} with captions.
        resolution: R; images are cropped and resized to R x R.
        buckets: Sizes of the images instead of R x R; the files' headers are read, see `assign_buckets`.
        seed: The run's seed.
        random_flip: Whether to flip images at random.
        background: Colour put behind transparent images, see `load_image`.

    Raises:
        ValueError: A bucket has no images.
    """

    channels = 3

    def __init__(
        self,
        source,
        *,
        image_column: str,
        label_column: str,
        captions: CaptionColumns | None = None,
        id2label: dict[int, str],
        resolution: int,
        buckets: Buckets | None = None,
        seed: int,
        random_flip: bool = False,
        background: str = "white",
    ):
        self.source, self.image_column, self.label_column = source, image_column, label_column
        self.captions, self.id2label, self.num_classes = captions, id2label, len(id2label)
        self.resolution, self.seed, self.random_flip = resolution, seed, random_flip
        self.background, self.buckets = background, buckets
        self.bucket_ids: Any = None if buckets is None else assign_buckets(source, image_column, buckets)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        corrupt = []
        for place in self._from(index):
            record = self.source[place]
            flip = self.random_flip and derive_seed(self.seed, "flip", epoch, place) % 2 == 1
            try:
                pixels = load_record(
                    record[self.image_column],
                    name=record.get("__key__", f"image {place}"),
                    resolution=self.resolution if self.buckets is None else self.buckets.sizes[self.bucket_ids[index]],
                    flip=flip,
                    background=self.background,
                )
            except UnreadableImage as error:
                corrupt.append(str(error))
            else:
                item = {"pixel_values": pixels, "corrupt": corrupt}
                if self.captions is None:
                    return item | {"class_labels": record[self.label_column]}
                return item | {"caption": self.captions.choose(record, seed=self.seed, epoch=epoch, place=place)}
        raise ValueError(
            f"Expected at least one readable image, got {len(corrupt)} unreadable ones, such as {corrupt[0]}."
        )

    def first_captions(self, most: int) -> list[str]:
        """The captions of the first `most` images in the first epoch."""
        records = self.source.select_columns(self.captions.columns(self.source.features))
        places = range(min(most, len(records)))
        return [self.captions.choose(records[place], seed=self.seed, epoch=0, place=place) for place in places]

    def _from(self, index: int) -> Iterator[int]:
        """The indices of an image's bucket, from this image on, around to the one before it."""
        yield index
        others = np.arange(len(self))
        if self.bucket_ids is not None:
            others = np.flatnonzero(self.bucket_ids == self.bucket_ids[index])
        yield from map(int, np.concatenate([others[others > index], others[others < index]]))


def open_images(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    captions: CaptionColumns | None = None,
    num_classes: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> tuple[Any, dict[int, str]]:
    """Opens a `datasets` repository or a folder of images and checks it before any work starts.

    Args:
        dataset_name: A repository on the Hub, or a local folder that `datasets.load_dataset` understands. Exactly one
            of `dataset_name` and `train_data_dir` is given.
        dataset_config_name: Configuration of the data set.
        train_data_dir: A folder with one folder of images per class, see `list_class_folders`. With captions: a folder
            with images and metadata.jsonl, .csv or .parquet, whose column "file_name" names them.
        split: The split to read or, for a folder, the sub-folder with the class folders or metadata. None for "train"
            of a repository, or the folder itself.
        image_column: Column with images.
        label_column: Column with class labels; not used with captions.
        captions: Columns with captions; None for class labels.
        num_classes: Number of classes; None for the number of names of the label column or, without names, the highest
            label plus one.
        streaming: Whether to read without downloading and indexing first.
        cache_dir: Where `datasets` keeps its cache.

    Returns:
        The `datasets` data set with undecoded images, and the names of the classes; {} with captions.

    Raises:
        ValueError: As for `list_class_folders`; the folder has no metadata; a column is missing; labels are not
            integers in [0, num_classes); a row has no caption; the data set is empty; `num_classes` is given with
            captions.
    """
    import datasets

    # Open.
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Expected either dataset_name or train_data_dir, got {dataset_name!r} and {train_data_dir!r}."
        )
    name, options = dataset_name or train_data_dir, {"streaming": streaming, "cache_dir": cache_dir}
    if dataset_name is not None:
        try:
            source = datasets.load_dataset(dataset_name, dataset_config_name, split=split or "train", **options)
        except LOST as error:
            raise ValueError(
                f"Expected access to the data set {dataset_name}, got: {str(error).rstrip('.')}. If it is gated, "
                f"accept its terms at https://huggingface.co/datasets/{dataset_name}. {ADVICE}"
            ) from error
        _refuse_guessed_classes(dataset_name, source)
    elif captions is not None:
        # The metadata alone: `datasets` would guess splits from the words in the images' paths.
        files = {"train": [str(find_metadata(train_data_dir, split))]}
        source = datasets.load_dataset("imagefolder", data_files=files, split="train", **options)
    else:
        source = _open_folder(list_class_folders(train_data_dir, split), streaming=streaming)

    # Columns.
    features = source.features or {}
    columns = [image_column, *([label_column] if captions is None else [])]
    for column in columns:
        if column not in features:
            raise ValueError(
                f"Expected a column {column!r} in {name}, got {sorted(features)}. "
                "Name the columns with image_column and label_column."
            )
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(f"Expected images in column {image_column!r}, got {features[image_column]}.")
    columns += [] if captions is None else captions.columns(features)
    columns += {"__key__"} & set(features) - set(columns)  # the key names images of tar files
    source = source.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))
    if captions is not None:
        _check_captions(source, captions, num_classes, streaming=streaming)
        return source, {}

    # Classes.
    names = getattr(features[label_column], "names", None)
    labels = None if streaming else _read_labels(source, label_column)
    num_classes = _count_classes(names, labels, num_classes, label_column)
    names = names or []
    return source, {label: names[label] if label < len(names) else str(label) for label in range(num_classes)}


def _open_folder(images: ClassFolders, *, streaming: bool):
    """Makes a data set of class folders, with the columns "image" (undecoded) and "label"."""
    import datasets
    import pyarrow

    names, size = datasets.ClassLabel(names=images.names), len(images.paths)
    files = pyarrow.StructArray.from_arrays(
        [pyarrow.nulls(size, pyarrow.binary()), pyarrow.array(images.paths)], names=["bytes", "path"]
    )
    source = datasets.Dataset.from_dict(
        {"image": files, "label": pyarrow.array(images.labels)},
        features=datasets.Features({"image": datasets.Image(decode=False), "label": names}),
    )
    # Many shards, because a stream mixes the classes by shuffling them.
    return source.to_iterable_dataset(num_shards=min(size, 1024)) if streaming else source


def _check_captions(source, captions: CaptionColumns, num_classes: int | None, *, streaming: bool) -> None:
    """Makes the checks of `open_images` for captions. Those of a stream are checked only when they are read."""
    if num_classes is not None:
        raise ValueError(f"Expected no num_classes with captions, got {num_classes}. Drop one of the two.")
    if not streaming:
        if len(source) == 0:
            raise ValueError("Expected at least one image, got an empty data set.")
        captions.check(source)


def _refuse_guessed_classes(dataset_name: str, source) -> None:
    """Raises ValueError for a folder without card: `datasets` would guess classes and splits from its paths."""
    folder = Path(dataset_name)
    described = [*folder.glob("README.md"), *folder.rglob("metadata.*")] if folder.is_dir() else [dataset_name]
    if not described and source.info.builder_name == "imagefolder":
        raise ValueError(
            f"Expected a data set with a card or metadata at {dataset_name}, got a folder of images. "
            "Name it with train_data_dir."
        )


def _read_labels(source, label_column: str) -> np.ndarray:
    """All labels of a map-style data set, checked to be integers."""
    labels = np.asarray(source.select_columns([label_column]).with_format("numpy")[:][label_column])
    if len(labels) == 0:
        raise ValueError("Expected at least one image, got an empty data set.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(
            f"Expected one integer class label per image in column {label_column!r}, got {labels.dtype} values. "
            "Convert the column with datasets' class_encode_column."
        )
    return labels


def _count_classes(
    names: list[str] | None, labels: np.ndarray | None, num_classes: int | None, label_column: str
) -> int:
    if num_classes is None:
        if names is None and labels is None:
            raise ValueError(
                f"Expected num_classes for a stream whose column {label_column!r} does not name its classes."
            )
        num_classes = len(names) if names is not None else int(labels.max()) + 1
    if names is not None and len(names) > num_classes:
        raise ValueError(f"Expected num_classes >= {len(names)}, the classes that the data name, got {num_classes}.")
    if labels is not None and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"Expected labels in [0, {num_classes}), got [{labels.min()}, {labels.max()}] in column {label_column!r}."
        )
    return num_classes
