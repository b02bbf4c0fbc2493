# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reads latents made by other tools, in webdataset shards, as batches for a `LatentsWriter`.

Such files do not say what their values are, so the argument `values` does:

    "latents"       latents                                                            C channels
    "moments"       mean and standard deviation of the VAE's posterior                 2C
    "mean_logvar"   mean and logarithm of the variance, as in MaskDiT and U-ViT        2C

The letters of the shapes are explained in codec.py.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .codec import pack_latents
from .info import LatentsInfo


# Largest member that is read, in bytes. 2C x S x S float64 is far below; a foreign shard may hold anything.
_MAX_ARRAY, _MAX_LABEL = 2**28, 2**10


class Record(NamedTuple):
    name: str
    values: np.ndarray
    """[M, S, S] float32."""
    label: int


def read_webdataset(
    tar: str | Path, *, latent_member: str = "latent.npy", label_member: str = "cls"
) -> Iterator[Record]:
    """Reads the records of one shard, in order, one by one. Nothing is unpickled.

    Args:
        tar: A shard. The files of a record follow each other and have the same name up to the first dot.
        latent_member: Rest of the name, after that dot, of the array: [M, S, S] or [1, M, S, S] in NumPy's format.
        label_member: Rest of the name of the class label: an integer as text.

    Raises:
        ValueError: The tar is unreadable, empty or cut off, or has data after its end; a name occurs twice; a record
            lacks one of these members or has it in another format. The message names the record.
    """
    wanted, seen = {latent_member: _MAX_ARRAY, label_member: _MAX_LABEL}, set()
    try:
        with tarfile.open(tar) as archive:
            for key, members in groupby(_files(archive, tar), key=lambda member: _split(member.name)[0]):
                # Members of the record.
                name, names, content = f"{key} of {tar}", set(), {}
                if key in seen:
                    raise ValueError(f"Expected the files of a record one after the other, got {name} twice.")
                seen.add(key)
                for member in members:
                    part = _split(member.name)[1]
                    if part in names:
                        raise ValueError(f"Expected each record once, got two files {part!r} for {name}.")
                    names.add(part)
                    if member.size > wanted.get(part, member.size):
                        raise ValueError(
                            f"Expected at most {wanted[part]} bytes in {part!r}, got {member.size} for {name}."
                        )
                    if part in wanted:
                        content[part] = archive.extractfile(member).read()

                # The record.
                if missing := sorted(set(wanted) - names):
                    raise ValueError(
                        f"Expected members {latent_member!r} and {label_member!r} in each record, got {sorted(names)} "
                        f"without {missing} for {name}. Name the members that there are."
                    )
                yield _decode(name, content[latent_member], content[label_member])
            if not seen:
                raise ValueError(f"Expected records in {tar}, got none. Leave it out.")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"Expected a whole tar file, got {tar} ({error}). Fetch it again.") from error


def to_batches(
    records: Iterable[Record], *, values: str, info: LatentsInfo, patch_size: int = 1, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Converts records to batches for `LatentsWriter.write`.

    Args:
        records: Records from `read_webdataset`.
        values: What the records hold, see the top of this module.
        info: Description of the folder to write.
        patch_size: Patch size of the VAE, see `pack_record`.
        batch_size: B.

    Raises:
        ValueError: A record's shape differs from the folder's, its label is outside the classes, or its values cannot
            be what `values` says. The message names the record.
    """
    records = (pack_record(record, info, patch_size) for record in records)
    while batch := list(islice(records, batch_size)):
        for record in batch:
            _check_record(record, values, info)
        moments = torch.from_numpy(np.stack([record.values for record in batch]))
        if values == "mean_logvar":
            mean, logvar = moments.chunk(2, dim=1)
            # Clamped to the range of diffusers' DiagonalGaussianDistribution.
            moments = torch.cat([mean, (0.5 * logvar.clamp(-30.0, 20.0)).exp()], dim=1)
        names, labels = [record.name for record in batch], [record.label for record in batch]
        yield {"names": names, "unreadable": [], "moments": moments, "label": labels}


def pack_record(record: Record, info: LatentsInfo, patch_size: int) -> Record:
    """Packs P x P squares of a record's latents into one pixel, if its VAE needs that and it is not done yet.

    Args:
        record: A record from `read_webdataset`.
        info: Description of the folder to write.
        patch_size: P, see `latent_patch_size`. Records that are already packed are returned unchanged.
    """
    channels, side, _ = info.shape
    if patch_size == 1 or record.values.shape != (channels // patch_size**2, side * patch_size, side * patch_size):
        return record
    parts = torch.from_numpy(record.values)[None].chunk(2 if info.kind == "moments" else 1, dim=1)
    return record._replace(values=torch.cat([pack_latents(part, patch_size) for part in parts], dim=1)[0].numpy())


def _check_record(record: Record, values: str, info: LatentsInfo) -> None:
    if record.values.shape != info.shape:
        raise ValueError(f"Expected latents {list(info.shape)}, got {list(record.values.shape)} for {record.name}.")
    if not 0 <= record.label < len(info.id2label):
        raise ValueError(f"Expected labels in [0, {len(info.id2label)}), got {record.label} for {record.name}.")
    spread = record.values[info.latent_channels :]
    if values == "moments" and (spread < 0).any():
        raise ValueError(
            f"Expected standard deviations, which are never negative, got {spread.min():.4g} for {record.name}. If "
            "the second half of the channels is the logarithm of the variance, say --values mean_logvar."
        )
    if values == "mean_logvar" and (spread > 0).all():
        raise ValueError(
            f"Expected logarithms of variances, most of which are negative, got none below {spread.min():.4g} for "
            f"{record.name}. If the second half of the channels is the standard deviation, say --values moments."
        )


def _files(archive: tarfile.TarFile, tar: str | Path) -> Iterator[tarfile.TarInfo]:
    """Yields the files of an archive, one by one. Raises OSError unless it ends properly."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # tarfile would keep all of them in memory
        if member.isreg():
            yield member
        elif not member.isdir():
            raise ValueError(f"Expected plain files, got {member.name} of {tar}, which is a link or a device.")
    _check_end(archive)


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises OSError unless an archive ends properly: tarfile mistakes any damage between two members for the end."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(512) != bytes(512):
        raise OSError("it is cut off or damaged between two files")
    while block := archive.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise OSError("it goes on after its end")


def _split(name: str) -> tuple[str, str]:
    """Splits the name of a record's file at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    key, _, member = last.partition(".")
    return f"{folder}{slash}{key}", member


def _decode(name: str, array: bytes, label: bytes) -> Record:
    if not re.fullmatch(rb"\s*-?[0-9]{1,18}\s*", label):
        raise ValueError(f"Expected an integer label, got {label[:40]!r} for {name}.")
    try:
        values = np.lib.format.read_array(io.BytesIO(array), allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, and raises what that raises
        raise ValueError(
            f"Expected a NumPy array, got something else for {name} ({error}). Pickles are not read, because they can "
            "run code: save arrays with numpy.save."
        ) from error
    values = values[0] if values.ndim == 4 and len(values) == 1 else values
    if values.ndim != 3 or values.dtype.kind != "f":
        raise ValueError(f"Expected latents [M, S, S], got {values.dtype} {list(values.shape)} for {name}.")
    return Record(name, values.astype(np.float32), int(label))
