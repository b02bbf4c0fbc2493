# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The images of a folder and their classes: one rule for training, latents, evaluation and references."""

import logging
import mimetypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image


logger = logging.getLogger(__name__)

# Pillow knows their suffixes and reads them only with a handler of the user's.
WITHOUT_READER = ("BUFR", "GRIB", "HDF5", "MPEG")
KINDS = mimetypes.MimeTypes()  # Python's own table, whatever the system's files say
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder that has one folder per class.

    Args:
        paths: The image files, class by class.
        labels: For each the index of its class.
        names: The classes: the sorted names of the folders.
    """

    paths: list[str]
    labels: list[int]
    names: list[str]


def list_images(folder: str | Path) -> list[str]:
    """The image files at any depth below a folder, in the order of their paths.

    An image is a file with the suffix of an image format, or, where the suffix is unknown, one that Pillow
    recognises. Links to files and folders are followed. Hidden files and folders and `__MACOSX` are skipped.

    Raises:
        ValueError: A folder is missing or cannot be read, a link leads nowhere, or a name is not UTF-8.
    """
    return _walk(str(folder), above=())


def list_class_folders(folder: str | Path, split: str | None = None) -> ClassFolders:
    """The images of a folder with one folder per class, whatever the classes are called.

    Args:
        folder: Its folders are the classes; the images of a class lie at any depth below, see `list_images`.
        split: The sub-folder that has the class folders, such as "train"; None if `folder` has them.

    Raises:
        ValueError: What `list_images` raises; images beside the class folders; no class folders; a class without
            images. The message names the folder.
    """
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
    """The file in a folder of images that has their names and captions, as `datasets` reads it.

    Args:
        folder: The folder.
        split: The sub-folder that has it, such as "train"; None if `folder` has it.

    Raises:
        ValueError: There is none, or more than one.
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
    """The images below a folder that lies below the real paths `above`."""
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
    """What counts of a folder, sorted by name."""
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
        return kind.startswith("image/")  # such as HEIC, which is counted as unreadable later
    try:
        with PIL.Image.open(entry.path) as image:
            return image.format not in WITHOUT_READER
    except Exception:  # whatever Pillow raises: no image
        return False


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case and with their dots, of the formats that Pillow reads."""
    known = PIL.Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in PIL.Image.OPEN and name not in WITHOUT_READER)


def _names(folder: str | Path) -> str:
    names = sorted(os.listdir(folder))
    return _some(names) if names else "nothing"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
