# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes a folder of latents shard by shard, with any number of processes, and verifies it.

While a folder is being written, it also holds `unfinished/` with a record of each complete shard, which is removed
once `latents.json` is written. info.py shows the layout; the letters of the shapes are explained in codec.py.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...files import file_sha256, full_disk_explained, publish, whole, write_json
from ...settings import check_settings
from .arrow import RECORD_BATCH, find_fault, regroup, to_table
from .info import INFO, LatentsInfo
from .text import EMPTY


SETTINGS, UNFINISHED = "latents_config.json", "unfinished"
_SOURCES = "shard_sources"
_GO_ON = "Free some space and run the same command, which goes on with the missing shards."


logger = logging.getLogger(__name__)


def verify_latents(folder: str | Path, *, checksums: bool = True) -> LatentsInfo:
    """Compares the shards of a finished folder with its `latents.json`.

    Args:
        folder: A folder of latents.
        checksums: Whether to read every shard and check its SHA-256, labels and values; False checks sizes only.

    Returns:
        The content of `latents.json`.

    Raises:
        ValueError: `latents.json` is missing, or shards are missing, cut off or changed; the message names them.
    """
    # Find problems.
    folder, info = Path(folder), LatentsInfo.load(folder)
    if info.text is not None:
        info.text.load_empty(folder)
    problems = {}
    for shard in tqdm(info.shards, desc="Verifying", unit="shard", disable=not checksums):
        path = folder / shard["file"]
        problem = _compare(path, shard, checksums=checksums)
        if problem is None and checksums:
            problem = find_fault(path, info, shard)
        if problem is not None:
            problems[shard["file"]] = problem

    # Report them together.
    if problems:
        raise ValueError(
            f"Expected the {len(info.shards)} shards of {folder} as they were written, got {_listed(problems)}. Fetch "
            f"those files again, or delete {INFO} and make all of them anew with the command that made the folder."
        )
    return info


class LatentsWriter:
    """Writes a folder of latents; after an interruption, it goes on with the missing shards.

    The main process calls `open`, then any number of processes `write` the missing shards, then the main process calls
    `finish`.

    Args:
        folder: The folder; created if missing.
        info: Description of the folder. Its `num_samples`, `shards` and `unreadable` are replaced in the end.
        num_shards: Number of shards of the whole folder.
        max_unreadable: Number of unreadable images that may be left out.
        size_places: For each shard, the index of its latents' size in `info.latent_sizes`; None without buckets.
        empty_text: Content of the file with the empty caption, for a folder with encoded captions.
    """

    def __init__(
        self,
        folder: str | Path,
        info: LatentsInfo,
        *,
        num_shards: int,
        max_unreadable: int = 0,
        size_places: Sequence[int] | None = None,
        empty_text: bytes | None = None,
    ):
        self.folder, self.info, self.max_unreadable = Path(folder), info, max_unreadable
        self.size_places, self.empty_text = size_places or [0] * num_shards, empty_text
        self._left_out: list[str] = []  # by this process
        self.files = [f"data/train-{shard:05d}-of-{num_shards:05d}.arrow" for shard in range(num_shards)]

    def open(self, settings: dict[str, Any], *, sources: Sequence[str] | None = None) -> list[int]:
        """Claims the folder and finds the shards that are left to write.

        Args:
            settings: Everything the shards depend on besides `info`, as JSON. Kept in `latents_config.json`.
            sources: For each shard, a text that changes with its source files, see `digest_files`; None if they are
                not known.

        Returns:
            The shards to write, including those whose sources have changed.

        Raises:
            ValueError: The folder was begun with other settings (the message says which) or holds other data; or it is
                finished and its sources have changed.
            OSError: The disk is full.
        """
        # Settings, compared with those of the folder.
        draft = dataclasses.replace(self.info, num_samples=1, shards=(), unreadable=()).to_dict()
        settings = json.loads(json.dumps(draft | settings | {"num_shards": len(self.files)}))
        settings[_SOURCES] = [None] * len(self.files) if sources is None else list(sources)
        before = _check_owner(self.folder, settings)
        if (self.folder / INFO).exists():
            self._check_sources(before, settings[_SOURCES])

        # Claim the folder. The settings come first: without them it would look like somebody else's.
        with self._disk_full_explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, settings)
            for name in ("data", UNFINISHED):
                (self.folder / name).mkdir(exist_ok=True)
            if self.empty_text is not None:
                with whole(self.folder / EMPTY) as temporary:
                    temporary.write_bytes(self.empty_text)

        # Delete what a killed process left.
        for half in self.folder.rglob("*.tmp"):
            half.unlink()
        if (self.folder / INFO).exists():
            shutil.rmtree(self.folder / UNFINISHED)
            return []
        return [shard for shard, source in enumerate(settings[_SOURCES]) if not self._is_whole(shard, source)]

    def write(self, shard: int, batches: Iterable[dict[str, Any]]) -> None:
        """Writes a shard atomically.

        Args:
            shard: Number of the shard.
            batches: The records of the shard, in order. A batch has the `names` of its B images, the names of
                `unreadable` images that are left out and, unless B is 0, the values for `to_table`.

        Raises:
            ValueError: As for `to_table`; too many images are unreadable, or all of them.
            OSError: The disk is full.
        """
        import pyarrow as pa

        # The shard.
        final = self.folder / self.files[shard]
        temporary = final.with_name(final.name + ".tmp")
        schema, num_samples = self.info.features().arrow_schema, 0
        unreadable: list[str] = []
        with self._disk_full_explained():
            try:
                with (
                    open(temporary, "wb") as file,
                    pa.ipc.new_stream(file, schema) as stream,
                ):
                    for table in regroup(self._tables(batches, unreadable)):
                        stream.write_table(table, max_chunksize=RECORD_BATCH)
                        num_samples += table.num_rows
                if num_samples == 0:  # `datasets` does not load shards without records
                    raise ValueError(
                        f"Expected a readable image in every shard, got only unreadable ones in {self.files[shard]}. "
                        "Repair them, or make larger shards."
                    )
                publish(temporary, final)
            finally:
                temporary.unlink(missing_ok=True)

            # Its record.
            size, sha256 = final.stat().st_size, file_sha256(final)
            record = {"file": self.files[shard], "num_samples": num_samples, "size": size, "sha256": sha256}
            record |= self._latent_size(shard)
            source = _read_settings(self.folder)[_SOURCES][shard]
            write_json(self._record_path(shard), record | {"unreadable": unreadable, "source": source})

    def finish(self) -> LatentsInfo:
        """Reads back and checks every shard and then writes `latents.json`. A finished folder is only checked again.

        Raises:
            ValueError: Too many images are unreadable; or a shard is missing or damaged, which the same command then
                writes again.
            OSError: The disk is full.
        """
        # Records of all shards.
        if (self.folder / INFO).exists():
            return verify_latents(self.folder)
        records: list[Any] = [self._read_record(shard) for shard in range(len(self.files))]
        if missing := [file for file, record in zip(self.files, records, strict=True) if record is None]:
            raise ValueError(
                f"Expected every shard of {self.folder}, got none of {missing}. Run the same command again."
            )
        unreadable = [name for record in records for name in record.pop("unreadable")]
        for record in records:
            del record["source"]
        self._check_unreadable(unreadable)

        # Read the shards back. A damaged one loses its record, so that it counts as missing.
        problems = {}
        for shard, record in enumerate(tqdm(records, desc="Verifying", unit="shard")):
            path = self.folder / record["file"]
            problem = _compare(path, record) or find_fault(path, self.info, record)
            if problem:
                problems[record["file"]] = problem
                self._record_path(shard).unlink()
        if problems:
            raise ValueError(
                f"Expected shards as they were written, got {_listed(problems)}. Run the same command to write them "
                "again, and check the disk."
            )

        # Description of the folder.
        total = sum(record["num_samples"] for record in records)
        info = dataclasses.replace(self.info, num_samples=total, shards=tuple(records), unreadable=tuple(unreadable))
        with self._disk_full_explained():
            write_json(self.folder / INFO, info.to_dict())
        shutil.rmtree(self.folder / UNFINISHED)
        return info

    def _tables(self, batches: Iterable[dict[str, Any]], unreadable: list[str]) -> Iterator[Any]:
        """Converts batches to tables, and adds the unreadable images to the list."""
        for batch in batches:
            unreadable += batch["unreadable"]
            self._left_out += batch["unreadable"]
            self._check_unreadable(self._left_out)
            if batch["names"]:
                yield to_table(batch, self.info)

    def _check_unreadable(self, unreadable: list[str]) -> None:
        if len(unreadable) > self.max_unreadable:
            raise ValueError(
                f"Expected at most {self.max_unreadable} unreadable images, got {len(unreadable)}, the last of them "
                f"{unreadable[-1]}. Repair them, or raise --max_corrupt_images and run the command again."
            )

    def _latent_size(self, shard: int) -> dict[str, list[int]]:
        """The field `latent_size` of a shard's record, with buckets; else nothing."""
        sizes = self.info.latent_sizes
        return {"latent_size": list(sizes[self.size_places[shard]])} if sizes else {}

    def _record_path(self, shard: int) -> Path:
        return self.folder / UNFINISHED / f"{Path(self.files[shard]).stem}.json"

    def _read_record(self, shard: int) -> dict[str, Any] | None:
        """Reads the record that `write` made of a shard; None if it is missing or damaged."""
        path, fields = self._record_path(shard), {"file", "num_samples", "size", "sha256", "unreadable", "source"}
        size = self._latent_size(shard)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if set(record) == fields | set(size) and record | size == record:
                return record
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError):
            pass
        logger.warning(f"Writing {self.files[shard]} again, whose record in {path} is damaged.")
        return None

    def _is_whole(self, shard: int, source: str | None) -> bool:
        record = self._read_record(shard)
        if record is None or record["source"] != source:
            return False
        return _compare(self.folder / self.files[shard], record, checksums=False) is None

    def _check_sources(self, before: dict[str, Any], sources: list[str | None]) -> None:
        old = before.get(_SOURCES)
        if changed := [file for file, was, now in zip(self.files, old, sources, strict=True) if was != now]:
            raise ValueError(
                f"Expected the images or shards that {self.folder} was made from, got others under the same names, "
                f"with another size or time of change: those of {changed[:5]}{' and more' if changed[5:] else ''}. "
                "Use another folder, or delete this one to make its latents anew."
            )

    def _disk_full_explained(self):
        return full_disk_explained(self.folder, remedy=_GO_ON)


def digest_files(paths: Iterable[str | Path]) -> str:
    """A hash of the names, sizes and modification times of some files, to notice changes without reading them."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        try:
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path.name!r} {state}\n".encode())
    return digest.hexdigest()


def _compare(path: Path, shard: dict[str, Any], *, checksums: bool = True) -> str | None:
    """Says how a file differs from what was written; None if it does not."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != shard["size"]:
        return f"has {size} bytes instead of {shard['size']}"
    if checksums and file_sha256(path) != shard["sha256"]:
        return "has another SHA-256"
    return None


def _listed(problems: dict[str, str]) -> str:
    return "; ".join(f"{file}, which {problem}" for file, problem in problems.items())


def _read_settings(folder: Path) -> dict[str, Any]:
    """Reads `latents_config.json`."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return settings | {_SOURCES: list(settings[_SOURCES])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the settings of a folder of latents, got others in {folder / SETTINGS} ({error}). Use another "
            "folder, or delete this one."
        ) from error


def _check_owner(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError unless a folder is new or was begun with the same settings, which are returned."""
    if not (folder / SETTINGS).exists():
        if (folder / INFO).exists() or (folder / "data").exists():
            raise ValueError(f"Expected a new folder, got {folder}, which holds other data. Use another one.")
        return {}
    check_settings(folder / SETTINGS, settings, free=[_SOURCES])
    return _read_settings(folder)
