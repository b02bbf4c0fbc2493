# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Claims an output folder for one run, and checks that the folder's files were made with the same settings.

The claim is a record lock of the kernel: it ends with its process, however that ends, and is not inherited by worker
processes that outlive it. The content of `.lock` serves the error message, and file systems without such locks.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .distributed import on_main_process
from .files import write_json
from .settings import check_settings


LOCK, SETTINGS = ".lock", "settings.json"
# Some network and FUSE file systems refuse to lock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_HELD: set[Path] = set()  # by this process: the kernel does not refuse a process its own lock


@contextmanager
def claim(
    folder: str | Path,
    settings: dict[str, Any] | None = None,
    *,
    free: Iterable[str] = (),
    record: str = SETTINGS,
    contents: Iterable[str] = (),
) -> Iterator[Path]:
    """Claims a folder for this run until the block ends; all processes of the run call it together.

    Args:
        folder: Made if missing, and removed again if nothing was written.
        settings: The settings that the folder's content depends on, JSON; None if there are none to keep the same.
        free: Names of settings that may change.
        record: The file in the folder that stores the settings.
        contents: Patterns of the files that depend on the settings. If no such file exists, any settings are accepted.

    Yields:
        The folder.

    Raises:
        ValueError: Another process is at work there; the folder holds files made with other or unknown settings; or it
            cannot be written.
    """
    folder = Path(folder)
    lock = on_main_process(lambda: FolderLock.take(folder), only_there=True)
    try:
        if settings is not None:
            on_main_process(lambda: _settle(folder, settings, free=free, record=record, contents=contents))
        yield folder
    finally:
        if lock is not None:
            lock.release()


class FolderLock:
    """The lock of one process on one folder, made by `take`."""

    def __init__(self, folder: Path, descriptor: int, *, made_folder: bool):
        self.folder, self.pid, self.made_folder = folder, os.getpid(), made_folder
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, folder: str | Path) -> "FolderLock":
        """Locks a folder, which is made if it is missing.

        Raises:
            ValueError: Another process, or this one, holds the lock; the folder cannot be written.
        """
        folder = Path(folder)
        made_folder = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder = folder.resolve()
            if folder in _HELD:
                raise ValueError(_refusal(folder, _describe_self()))
            descriptor = _lock(folder / LOCK)
        except OSError as error:
            raise ValueError(
                f"Expected a folder that this process may write, got {folder} ({error.strerror or error}). Use "
                "another one, or change its permissions."
            ) from error
        _HELD.add(folder)
        return cls(folder, descriptor, made_folder=made_folder)

    def release(self) -> None:
        """Releases the folder; does nothing in a forked child, or when called again."""
        if self._descriptor is None or os.getpid() != self.pid:
            return
        _HELD.discard(self.folder)
        descriptor, self._descriptor = self._descriptor, None
        try:
            (self.folder / LOCK).unlink(missing_ok=True)
            if self.made_folder and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError:  # the folder is gone, or its disk
            pass
        finally:
            os.close(descriptor)


def _settle(folder: Path, settings: dict[str, Any], *, free: Iterable[str], record: str, contents: Iterable[str]):
    path = folder / record
    found = sorted(file.relative_to(folder).as_posix() for pattern in contents for file in folder.glob(pattern))
    if found and not path.exists():
        raise ValueError(
            f"Expected a new folder or one with {record}, got {folder} with {found[:3]} of unknown settings. Use "
            "another folder."
        )
    if found:
        check_settings(path, settings, free=free)
    write_json(path, settings)


def _lock(path: Path) -> int:
    """Locks a file, writes this process into it as the owner, and returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            owner = _read_owner(descriptor)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise ValueError(_refusal(path.parent, owner)) from None
                if error.errno not in _NO_LOCKS:
                    raise
                # Without locks, believe the owner written in the file, unless it is known to be dead.
                if owner and not _is_dead(owner):
                    raise ValueError(
                        f"{_refusal(path.parent, owner)} This file system has no locks: if that process is dead, "
                        f"delete {path}."
                    ) from None

            # The previous owner may have deleted the file in between: then lock a new one.
            if not _is_file(path, descriptor):
                os.close(descriptor)
                continue

            # The new owner.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_describe_self()).encode(), 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _describe_self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:300],
    }


def _read_owner(descriptor: int) -> dict[str, Any]:
    """The owner that the file names; empty if it names none."""
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host and is gone, even if its number is in use again."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        return psutil.Process(owner["pid"]).create_time() != owner["process_start"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True
    except psutil.AccessDenied:
        return False


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}: {owner.get('command')}"
    return f"Expected {folder} for this run alone, got one at work there ({who}). Wait for it, or use another folder."
