# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Atomic writes: a file or folder is there complete or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# How libraries report a full disk; some of them hide the error number.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_TEXTS = ("no space left", "quota exceeded", "file too large", "os error 28", "os error 122", "os error 27")
_DISK_FULL_TEXTS += ("pytorchstreamwriter failed writing", "file write failed", "iostream error", "unexpected pos")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Writes a file or folder under a temporary name, and renames it to `path` when the block ends.

    Args:
        path: The final name, in a folder that exists. Whatever has that name is replaced in one step.

    Yields:
        The temporary name. Nothing is left there if the block fails.

    Raises:
        OSError: The disk is full; the message gives the disk and its free space.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)  # left by a process that was killed
    try:
        with full_disk_explained(path):
            yield temporary
            if temporary.is_dir():
                replace_folder(temporary, path)
            else:
                publish(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def full_disk_explained(
    path: str | Path, *, remedy: str = "Free some space and run the same command again."
) -> Iterator:
    """Turns any error that a full disk causes in a library into an OSError that names the disk.

    Args:
        path: The file or folder being written.
        remedy: What the user can do, the last sentence of the error.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        disk, usage = find_disk(path), None
        try:
            usage = shutil.disk_usage(disk)
        except OSError:
            pass
        room = f", which has {usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB free" if usage else ""
        raise OSError(
            errno.ENOSPC,
            f"Expected room for {path} on the disk {disk}{room}, got: {error}. Nothing half-written is left. {remedy}",
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, reports a full disk, an exceeded quota or a file-size limit."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in _DISK_FULL:
                return True
        elif any(text in str(error).lower() for text in _DISK_FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def find_disk(path: str | Path) -> Path:
    """The mount point of the file system that holds a path; the path need not exist."""
    path = Path(path).resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def publish(temporary: Path, final: Path) -> None:
    """Flushes a written file to the disk and renames it to its final name, replacing a file of that name."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def replace_folder(folder: Path, final: Path) -> None:
    """Flushes a finished folder to the disk and renames it to its final name, replacing what has that name."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    old = final.with_name(final.name + ".old.tmp")
    remove(old)
    if os.path.lexists(final):
        final.rename(old)
    folder.rename(final)
    sync(final.parent)
    remove(old)


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: It is missing, cut off, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected a JSON object in {path}, got {error or type(error).__name__}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(content).__name__}.")
    return content


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of any size, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_local_paths(folder: str | Path) -> None:
    """Removes `_name_or_path` from a saved pipeline's configs where it is a folder of this machine."""
    for path in [*Path(folder).glob("*/*config.json"), Path(folder, "model_index.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        place = Path(content.get("_name_or_path") or "-")
        if place.is_absolute() or place.exists():
            write_json(path, content | {"_name_or_path": None})


def find_pipeline(name: str | Path) -> str:
    """The folder "pipeline" inside a run's folder; any other name is returned unchanged.

    Args:
        name: The folder of a pipeline or of a run, or a repository on the Hub.

    Raises:
        ValueError: A run's folder has no pipeline.
    """
    inside = Path(name, "pipeline")
    if Path(name, "model_index.json").exists():
        return str(name)
    if (inside / "model_index.json").is_file():
        return str(inside)
    if Path(name, "train_config.json").is_file():
        raise ValueError(
            f"Expected the folder of a run that saved its pipeline, got {name} without one: the run is not finished. "
            "Its command goes on with it."
        )
    return str(name)
