# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Lists the images of a folder and their classes, by one rule for training, latents, evaluation and references."""

import logging
import mimetypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image


logger = logging.getLogger(__name__)

# Formats whose suffixes Pillow knows, but which it reads only with a handler from the user.
WITHOUT_READER = ("BUFR", "GRIB", "HDF5", "MPEG")
KINDS = mimetypes.MimeTypes()  # Python's own table, independent of the system's files
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder that has one folder per class.

    Args:
        paths: The image files, class by class.
        labels: The index of the class of each image.
        names: Names of the classes: the sorted names of the folders.
    """

    paths: list[str]
    labels: list[int]
    names: list[str]


def list_images(folder: str | Path) -> list[str]:
    """Lists the image files at any depth below a folder, in the order of their paths.

    An image is a file with the suffix of an image format or, if the suffix is unknown, a file that Pillow recognises.
    Links to files and folders are followed. Hidden files and folders and `__MACOSX` are skipped.

    Raises:
        ValueError: A folder is missing or cannot be read, a link is broken, or a name is not UTF-8.
    """
    return _walk(str(folder), above=())


def list_class_folders(folder: str | Path, split: str | None = None) -> ClassFolders:
    """Lists the images of a folder with one folder per class, whatever the names of the classes.

    Args:
        folder: Folder whose sub-folders are the classes. The images of a class may be at any depth below its folder,
            see `list_images`.
        split: The sub-folder with the class folders, such as "train"; None if they are in `folder` itself.

    Raises:
        ValueError: As for `list_images`; there are images beside the class folders; there are no class folders; a
            class has no images. The message names the folder.
    """
    # Class folders.
    folder = Path(folder)
    if split is not None:
        if not (folder / split).is_dir():
            raise ValueError(f"Expected a folder {split} in {folder}, got {_names(folder)}.")
        folder = folder / split
    entries = _entries(str(folder))
    classes = [entry for entry in entries if entry.is_dir()]
    if beside := [entry.path for entry in entries if _is_image(entry)]:
        raise ValueError(
            f"Expected one folder of images per class in {folder}, got images without a class: {_some(beside)}. "
            "Move them into folders of their classes."
        )
    if not classes:
        raise ValueError(f"Expected one folder of images per class in {folder}, got {_names(folder)}.")
    if len(classes) > 1 and all(entry.name.lower() in SPLITS for entry in classes):
        logger.warning(
            f"The classes of {folder} are {_some([entry.name for entry in classes])}. If these are splits with class "
            "folders in them, name one: split, or --dataset_split of the scripts."
        )

    # Their images.
    paths, labels = [], []
    for label, entry in enumerate(classes):
        its_paths = _walk(entry.path, above=(os.path.realpath(folder),))
        if not its_paths:
            raise ValueError(
                f"Expected images in every class folder, got none in {entry.path}, which has {_names(entry.path)}. "
                "Add some or take it away."
            )
        paths += its_paths
        labels += [label] * len(its_paths)
    return ClassFolders(paths, labels, [entry.name for entry in classes])


def find_metadata(folder: str | Path, split: str | None = None) -> Path:
    """Finds the metadata file with names and captions in a folder of images, in the format of `datasets`.

    Args:
        folder: The folder.
        split: The sub-folder with the file, such as "train"; None if it is in `folder` itself.

    Raises:
        ValueError: There is no such file, or more than one.
    """
    folder = Path(folder, split or "")
    if not folder.is_dir():
        raise ValueError(f"Expected a folder with metadata and images, got no folder {folder}.")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) != 1:
        raise ValueError(
            f"Expected one of {', '.join(METADATA)} in {folder}, with captions and the file_name of each image, got "
            f"{_some([path.name for path in found]) or _names(folder)}. Name a folder of webdataset tars as a "
            "repository: hub:FOLDER."
        )
    return found[0]


def _walk(folder: str, above: tuple[str, ...]) -> list[str]:
    """Lists the images below a folder; `above` are the real paths of its parents, to detect cycles of links."""
    real = os.path.realpath(folder)
    if real in above:
        logger.warning(f"{folder} links to {real}, in which it lies; its images are taken once.")
        return []
    paths = []
    for entry in _entries(folder):
        if entry.is_dir():
            paths += _walk(entry.path, (*above, real))
        elif _is_image(entry):
            paths.append(entry.path)
    return paths


def _entries(folder: str) -> list[os.DirEntry]:
    """The visible entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if entry.name[0] != "." and entry.name != "__MACOSX"]
    except OSError as error:
        raise ValueError(f"Expected a folder that can be read, got {folder!r} ({error.strerror}).") from error
    for entry in visible:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"Expected names in UTF-8, got {os.fsencode(entry.path)}. Rename it.") from None
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise ValueError(f"Expected links that lead somewhere, got {entry.path} to {os.readlink(entry.path)}.")
    return sorted(visible, key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if not entry.is_file():  # a folder, a pipe, a device
        return False
    if suffix in image_suffixes():
        return True
    if (kind := KINDS.guess_type(f"name{suffix}", strict=False)[0]) is not None:
        return kind.startswith("image/")  # also HEIC, which is reported as unreadable later
    try:
        with PIL.Image.open(entry.path) as image:
            return image.format not in WITHOUT_READER
    except Exception:  # any error of Pillow: not an image
        return False


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that Pillow reads, in lower case, with the dot."""
    known = PIL.Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in PIL.Image.OPEN and name not in WITHOUT_READER)


def _names(folder: str | Path) -> str:
    names = sorted(os.listdir(folder))
    return _some(names) if names else "nothing"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
