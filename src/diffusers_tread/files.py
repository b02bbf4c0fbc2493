# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are there whole or not at all."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def publish(temporary: Path, final: Path) -> None:
    """Flushes a written file to the disk and gives it its final name, in place of what may stand there."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def replace_folder(folder: Path, final: Path) -> None:
    """Flushes a finished folder to the disk and renames it to its final name, in place of what may stand there."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    old = final.with_name(final.name + ".old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
