# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Labelled images from scikit-learn's digits, a folder or any `datasets` repository, as tensors in [-1, 1].

Shapes: B batch, C channels, R resolution. A batch is {"pixel_values": [B, C, R, R] float32, "class_labels": [B] int64,
"corrupt": ids of the unreadable images that were met and replaced while it was made}.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch
from torch.utils.data import Dataset

from ..seeds import derive_seed
from .folders import ClassFolders, list_class_folders


# What to do with an image for each value of EXIF's orientation. Not `exif_transpose`: it writes the EXIF data anew and
# fails where an entry that nobody needs is damaged.
UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it and says why."""


def load_image(
    file: str | Path | bytes | None, *, name: str, resolution: int | None = None, background: str = "white"
) -> PIL.Image.Image:
    """An image file as 8-bit RGB, upright, with its transparent parts on a background.

    16-bit grey is scaled to 8 bits and float grey from [0, 1], so that white stays white.

    Args:
        file: Path or content; None for an image that is missing.
        name: What the message calls it.
        resolution: R, to which `center_crop` crops and resizes; None for the size that it has.
        background: Colour that Pillow knows, such as "white" or "#808080".

    Raises:
        ValueError: Pillow knows no such colour.
        UnreadableImage: It is missing, damaged, larger than twice `PIL.Image.MAX_IMAGE_PIXELS`, or grey of an unknown
            range: 32-bit integers, floats outside [0, 1].
    """
    behind = PIL.ImageColor.getrgb(background)[:3]
    if file is None:
        raise UnreadableImage(f"{name} (missing)")
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION)
            image.load()
            image = _to_rgb(image, behind)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        return image if resolution is None else center_crop(image, resolution)
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise UnreadableImage(f"{name} ({type(error).__name__}: {error})") from error


def _to_rgb(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """A decoded image as 8-bit RGB."""
    is_grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if is_grey16 or image.mode in ("I", "F"):
        grey, transparent = np.array(image), image.info.get("transparency")
        white = 65535 if is_grey16 else 1
        if image.mode == "I" and not is_grey16 or not (grey.min() >= 0 and grey.max() <= white):  # also refuses NaN
            raise ValueError(f"expected grey of 16 bits or in [0, 1], got mode {image.mode} with {grey.max():g}")
        # In float64, which halves exactly: 255 / 65535 = 1 / 257.
        pixels = np.rint(grey.astype(np.float64) * 255 / white).astype(np.uint8)
        image = PIL.Image.fromarray(pixels).convert("RGB")
        if isinstance(transparent, int):
            image.putalpha(PIL.Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        canvas = PIL.Image.new("RGBA", image.size, background)
        image = PIL.Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image: PIL.Image.Image, resolution: int) -> PIL.Image.Image:
    """The middle square of an image at `resolution`, as ADM prepares ImageNet (arXiv 2105.05233).

    The image is halved with a box filter while its short side is at least twice the resolution, then resized with a
    bicubic filter until the short side fits, then cropped. Of an image that is more than eight times as long as wide
    the middle alone is resized, so that it takes no memory that its square does not need.
    """
    width, height = (min(side, 8 * min(image.size)) for side in image.size)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """An 8-bit RGB image as [3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # H W 3
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def collate_images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of one of the data sets below as a batch."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "class_labels": torch.tensor([item["class_labels"] for item in items], dtype=torch.int64),
        "corrupt": [image for item in items for image in item["corrupt"]],
    }


class DigitsDataset(Dataset):
    """The 1,797 handwritten digits of scikit-learn: 8x8 pixels, one channel, ten classes, nothing to download.

    Indexed like `ImageDataset`. Raises ImportError without scikit-learn.
    """

    num_classes, channels, resolution = 10, 1, 8

    def __init__(self):
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
    """The images and labels of a map-style `datasets.Dataset`.

    Items are asked for by (epoch, index), because the flip depends on both. An unreadable image is replaced by the
    next readable one and reported in the item's `corrupt`.

    Args:
        source: A data set as `open_images` returns it, images undecoded.
        image_column: Its column with images.
        label_column: Its column with class labels, as integers.
        id2label: Names of the classes.
        resolution: R; images are cropped and resized to R x R.
        seed: The run's seed.
        random_flip: Whether to flip images at random.
        background: Colour behind transparent images, see `load_image`.
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
        background: str = "white",
    ):
        self.source, self.image_column, self.label_column = source, image_column, label_column
        self.id2label, self.num_classes = id2label, len(id2label)
        self.resolution, self.seed, self.random_flip = resolution, seed, random_flip
        self.background = background

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        corrupt = []
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            record = self.source[place]
            flip = self.random_flip and derive_seed(self.seed, "flip", epoch, place) % 2 == 1
            try:
                pixels = load_record(
                    record[self.image_column],
                    name=record.get("__key__", f"image {place}"),
                    resolution=self.resolution,
                    flip=flip,
                    background=self.background,
                )
            except UnreadableImage as error:
                corrupt.append(str(error))
            else:
                return {"pixel_values": pixels, "class_labels": record[self.label_column], "corrupt": corrupt}
        raise ValueError(
            f"Expected at least one readable image, got {len(self)} unreadable ones, such as {corrupt[0]}."
        )


def load_record(
    value: dict[str, Any] | None, *, name: str, resolution: int, flip: bool = False, background: str = "white"
) -> torch.Tensor:
    """An undecoded image of a `datasets` record as [3, R, R] float32 in [-1, 1].

    Args:
        value: {"bytes": ..., "path": ...}, or None for an image that is missing.
        name: What messages call it if it has no path.
        resolution: R; see `center_crop`.
        flip: Whether to mirror it.
        background: See `load_image`.

    Raises:
        UnreadableImage: See `load_image`.
        OSError: The connection to a remote image was lost.
    """
    path, file = (value or {}).get("path"), (value or {}).get("bytes")
    if file is None and path is not None:
        file = _read_remote(path) if "://" in path else path
    image = load_image(file, name=path or name, resolution=resolution, background=background)
    if flip:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image_to_tensor(image)


def _read_remote(url: str) -> bytes | None:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def read_image(value: dict[str, Any] | None, *, resolution: int, **options: Any) -> torch.Tensor | None:
    """What `load_record` gives; None for an image that is unreadable."""
    try:
        return load_record(value, name="image", resolution=resolution, **options)
    except UnreadableImage:
        return None


def open_images(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    num_classes: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> tuple[Any, dict[int, str]]:
    """Opens a `datasets` repository or a folder of images and checks it before any work starts.

    Args:
        dataset_name: A repository on the Hub, or a local folder that `datasets.load_dataset` understands.
        dataset_config_name: Its configuration.
        train_data_dir: A folder with one folder of images per class, see `list_class_folders`. Exactly one of the two
            is given.
        split: The split to read, of a folder the sub-folder with the class folders; None for "train" of a repository
            and for the folder itself.
        image_column: Column with images.
        label_column: Column with class labels.
        num_classes: Number of classes; None for the number that the label column names or, without names, the highest
            label plus one.
        streaming: Whether to read without downloading and indexing first.
        cache_dir: Where `datasets` keeps its cache.

    Returns:
        The `datasets` data set with its images undecoded, and the names of the classes.

    Raises:
        ValueError: What `list_class_folders` refuses; a missing column; labels that are no integers in
            [0, num_classes); an empty set.
    """
    import datasets

    # Open.
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Expected either dataset_name or train_data_dir, got {dataset_name!r} and {train_data_dir!r}."
        )
    if train_data_dir is not None:
        source = _open_folder(list_class_folders(train_data_dir, split), streaming=streaming)
    else:
        options = {"split": split or "train", "streaming": streaming, "cache_dir": cache_dir}
        source = datasets.load_dataset(dataset_name, dataset_config_name, **options)
        _refuse_guessed_classes(dataset_name, source)

    # Columns.
    features = source.features or {}
    for column in (image_column, label_column):
        if column not in features:
            raise ValueError(
                f"Expected a column {column!r} in {dataset_name or train_data_dir}, got {sorted(features)}. "
                "Name the columns with image_column and label_column."
            )
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(f"Expected images in column {image_column!r}, got {features[image_column]}.")
    columns = [image_column, label_column, *({"__key__"} & set(features))]  # the key names images of tar files
    source = source.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))

    # Classes.
    names = getattr(features[label_column], "names", None)
    labels = None if streaming else _read_labels(source, label_column)
    num_classes = _count_classes(names, labels, num_classes, label_column)
    names = names or []
    return source, {label: names[label] if label < len(names) else str(label) for label in range(num_classes)}


def _open_folder(images: ClassFolders, *, streaming: bool):
    """The images of class folders as a data set with columns "image", undecoded, and "label"."""
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
    # Of many shards, because a stream mixes its classes by the order of these.
    return source.to_iterable_dataset(num_shards=min(size, 1024)) if streaming else source


def _refuse_guessed_classes(dataset_name: str, source) -> None:
    """Of a local folder without a card `datasets` guesses classes and splits from the words in its paths."""
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
