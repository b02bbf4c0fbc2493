# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writing a folder of latents shard by shard, with any number of processes, and checking one.

While it is written, a folder also holds `unfinished/`, with a record of each shard that is whole. It is gone once
`latents.json` is there. The layout is that of info.py, the letters of the shapes are those of codec.py.
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
        checksums: Whether to read every shard, compare its SHA-256 and look at its labels and values, or to look at
            its size only.

    Returns:
        The content of `latents.json`.

    Raises:
        ValueError: There is none; shards are missing, cut off or changed, with their names.
    """
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
    if problems:
        raise ValueError(
            f"Expected the {len(info.shards)} shards of {folder} as they were written, got {_listed(problems)}. Fetch "
            f"those files again, or delete {INFO} and make all of them anew with the command that made the folder."
        )
    return info


class LatentsWriter:
    """Writes a folder of latents; one that was killed goes on where it was.

    The main process calls `open`, then any processes `write` the missing shards, then the main process `finish`.

    Args:
        folder: The folder; made if missing.
        info: What it will hold. Its `num_samples`, `shards` and `unreadable` are replaced by what is written.
        num_shards: Shards of the whole folder.
        max_unreadable: How many unreadable images may be left out.
        size_places: For each shard the place of its latents' size in `info.latent_sizes`; None without buckets.
        empty_text: Content of the empty caption's file, of a folder with encoded captions.
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
        """Claims the folder and finds what is left to do.

        Args:
            settings: What the shards depend on besides `info`, JSON. Kept in `latents_config.json`.
            sources: For each shard a text that changes with what it is made from, see `digest_files`. None if nothing
                is known of that.

        Returns:
            The shards still to be written, those whose sources changed since included.

        Raises:
            ValueError: The folder holds something else, with what differs; it is finished and its sources changed.
            OSError: The disk is full.
        """
        draft = dataclasses.replace(self.info, num_samples=1, shards=(), unreadable=()).to_dict()
        settings = json.loads(json.dumps(draft | settings | {"num_shards": len(self.files)}))
        settings[_SOURCES] = [None] * len(self.files) if sources is None else list(sources)
        before = _check_owner(self.folder, settings)
        if (self.folder / INFO).exists():
            self._check_sources(before, settings[_SOURCES])
        with self._disk_full_explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, settings)
            for name in ("data", UNFINISHED):  # after the settings, without which they are somebody else's
                (self.folder / name).mkdir(exist_ok=True)
            if self.empty_text is not None:
                with whole(self.folder / EMPTY) as temporary:
                    temporary.write_bytes(self.empty_text)

        # What a killed process left.
        for half in self.folder.rglob("*.tmp"):
            half.unlink()
        if (self.folder / INFO).exists():
            shutil.rmtree(self.folder / UNFINISHED)
            return []
        return [shard for shard, source in enumerate(settings[_SOURCES]) if not self._is_whole(shard, source)]

    def write(self, shard: int, batches: Iterable[dict[str, Any]]) -> None:
        """Writes a shard, which appears whole or not at all.

        Args:
            shard: Its number.
            batches: Its records in order. Each has `names`, those of B images, and `unreadable`, those of images left
                out; unless B is 0 also what `to_table` reads.

        Raises:
            ValueError: What `to_table` refuses; too many unreadable images, or nothing else.
            OSError: The disk is full.
        """
        import pyarrow as pa

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
            size, sha256 = final.stat().st_size, file_sha256(final)
            record = {"file": self.files[shard], "num_samples": num_samples, "size": size, "sha256": sha256}
            record |= self._latent_size(shard)
            source = _read_settings(self.folder)[_SOURCES][shard]
            write_json(self._record_path(shard), record | {"unreadable": unreadable, "source": source})

    def finish(self) -> LatentsInfo:
        """Reads every shard back, checks it and, last of all, writes `latents.json`; checks a finished folder again.

        Raises:
            ValueError: Too many unreadable images; a shard is not what was written, which the same command then writes
                again.
            OSError: The disk is full.
        """
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

        # Read back. What is damaged loses its record, so that it counts as missing.
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

        total = sum(record["num_samples"] for record in records)
        info = dataclasses.replace(self.info, num_samples=total, shards=tuple(records), unreadable=tuple(unreadable))
        with self._disk_full_explained():
            write_json(self.folder / INFO, info.to_dict())
        shutil.rmtree(self.folder / UNFINISHED)
        return info

    def _tables(self, batches: Iterable[dict[str, Any]], unreadable: list[str]) -> Iterator[Any]:
        """Batches as tables; the unreadable images are added to the list."""
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
        """What a shard's record says of its size, with buckets."""
        sizes = self.info.latent_sizes
        return {"latent_size": list(sizes[self.size_places[shard]])} if sizes else {}

    def _record_path(self, shard: int) -> Path:
        return self.folder / UNFINISHED / f"{Path(self.files[shard]).stem}.json"

    def _read_record(self, shard: int) -> dict[str, Any] | None:
        """What `write` noted of a shard; None if it is missing or damaged."""
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
    """A hash of the names, sizes and times of change of some files, that is of whether they are still the same."""
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
    """How a file differs from what was written, if at all."""
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
    """The content of `latents_config.json`."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return settings | {_SOURCES: list(settings[_SOURCES])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the settings of a folder of latents, got others in {folder / SETTINGS} ({error}). Use another "
            "folder, or delete this one."
        ) from error


def _check_owner(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A folder must be new, or hold what the same settings began; these are returned."""
    if not (folder / SETTINGS).exists():
        if (folder / INFO).exists() or (folder / "data").exists():
            raise ValueError(f"Expected a new folder, got {folder}, which holds other data. Use another one.")
        return {}
    check_settings(folder / SETTINGS, settings, free=[_SOURCES])
    return _read_settings(folder)
