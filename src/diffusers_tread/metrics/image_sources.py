# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sources of images to extract features from: the protocol, folders, `datasets` repositories.

Images can be read in any order, so that processes can share the work. They are converted to RGB by `load_image`.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch

from ..data.folders import list_images
from ..data.images import UnreadableImage, load_image
from ..files import file_sha256
from ..hub_errors import ADVICE, LOST
from ..pictures import save_image


class ImageSource(Protocol):
    """Any set of images that can be read in parts. If scorers are to rate them, it also needs `prompt(index)`."""

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the images in feature stores and results (JSON)."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads the images start .. stop - 1 as [B, 3, H, W] uint8."""
        ...


class FolderImages:
    """The image files of a folder and its sub-folders, found as in training, see `list_images`.

    Args:
        folder: Folder with at least one image.
        resolution: Side in pixels to which `center_crop` crops and resizes; None if all images already have one size.
        background: Colour put behind transparent images, see `load_image`.

    Raises:
        ValueError: The folder has no images; as for `list_images`.
    """

    def __init__(self, folder: str | Path, *, resolution: int | None = None, background: str = "white"):
        self.folder, self.resolution, self.background = Path(folder), resolution, background
        self.paths = [Path(path) for path in list_images(folder)]
        if not self.paths:
            raise ValueError(f"Expected a folder with images, got {folder}, in which there are none.")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads the images start .. stop - 1 as [B, 3, H, W] uint8.

        Raises:
            ValueError: A file is unreadable or of another size; the message names it.
        """
        return _stack(
            [(path, str(path)) for path in self.paths[start:stop]],
            resolution=self.resolution,
            background=self.background,
        )

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the images by a hash of the files' names and contents."""
        return self._description

    @cached_property  # separate, because type checkers do not accept it as the protocol's property
    def _description(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.relative_to(self.folder).as_posix()} {file_sha256(path)}\n".encode())
        return {
            "kind": "folder",
            "name": self.folder.resolve().name,
            "num_images": len(self),
            "resolution": self.resolution,
            "background": self.background,
            "sha256": digest.hexdigest(),
        }


class DatasetImages:
    """The images of a map-style `datasets` repository; labels are not needed.

    Args:
        dataset_name: Repository on the Hub, or a local folder that `datasets.load_dataset` reads.
        resolution: Side in pixels to which `center_crop` crops and resizes.
        dataset_config_name: Configuration of the data set.
        split: Split to read.
        image_column: Column with the images.
        background: Colour put behind transparent images, see `load_image`.
        cache_dir: Cache folder of `datasets`.

    Raises:
        ValueError: The data set is missing or not accessible, or has no such column of images.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        resolution: int,
        dataset_config_name: str | None = None,
        split: str = "train",
        image_column: str = "image",
        background: str = "white",
        cache_dir: str | None = None,
    ):
        import datasets

        try:
            source = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
        except LOST as error:
            raise ValueError(
                f"Expected access to the data set {dataset_name}, got: {str(error).rstrip('.')}. {ADVICE}"
            ) from error
        if not isinstance(source.features.get(image_column), datasets.Image):
            raise ValueError(
                f"Expected images in column {image_column!r} of {dataset_name}, got columns {source.features}."
            )
        source = source.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self.source, self.image_column = source, image_column
        self.resolution, self.background = resolution, background
        self.name = {"name": dataset_name, "config": dataset_config_name, "split": split}

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads the images start .. stop - 1 as [B, 3, resolution, resolution] uint8.

        Raises:
            ValueError: An image is unreadable; the message names it.
        """
        images = []
        for row in range(start, stop):
            value = self.source[row][self.image_column] or {"bytes": None, "path": None}
            name = f"image {row} of {self.name['name']}"
            images.append((value["path"] if value["bytes"] is None else value["bytes"], name))
        return _stack(images, resolution=self.resolution, background=self.background)

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the images by the version in `datasets`' cache: a commit on the Hub, or a hash of local files."""
        version = ["/".join(Path(file["filename"]).parts[-4:-1]) for file in self.source.cache_files[:1]]
        return {
            "kind": "dataset",
            **self.name,
            "image_column": self.image_column,
            "num_images": len(self),
            "resolution": self.resolution,
            "background": self.background,
            "version": version,
        }


class KeptImages:
    """Wraps a source and keeps its first images, when they are read, as PNG files `000000.png`, `000001.png`, ...

    Args:
        source: The images.
        folder: Folder for the files; created if missing.
        num_kept: Number of first images to keep.
    """

    def __init__(self, source: ImageSource, *, folder: str | Path, num_kept: int):
        self.source, self.folder, self.num_kept = source, Path(folder), min(num_kept, len(source))

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads the images start .. stop - 1 as [B, 3, H, W] uint8, and writes the files of those to keep."""
        images = self.source.read(start, stop)
        for index, image in zip(range(start, min(stop, self.num_kept)), images, strict=False):
            save_image(PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), self.path(index))
        return images

    def prompt(self, index: int) -> str:
        """The source's prompt of an image."""
        return self.source.prompt(index)

    def path(self, index: int) -> Path:
        """Path of a kept image."""
        return self.folder / f"{index:06d}.png"

    @property
    def description(self) -> dict[str, Any]:
        """The source's description and the number of kept images, so that no finished batch lacks its files."""
        return self.source.description | {"num_kept": self.num_kept}


def _stack(images: list[tuple[Path | bytes | None, str]], *, resolution: int | None, background: str) -> torch.Tensor:
    """Reads files, each given with its name, to [B, 3, H, W] uint8."""
    arrays = []
    for file, name in images:
        try:
            image = load_image(file, name=name, resolution=resolution, background=background)
        except UnreadableImage as error:
            raise ValueError(f"Expected a readable image, got {error}. Repair it or take it away.") from error
        arrays.append(np.array(image))  # H W 3
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"Expected images of one size, got {arrays[0].shape[:2]} and {arrays[-1].shape[:2]} ({name}). "
                "Give the resolution to which all are cropped."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
