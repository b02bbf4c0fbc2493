# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Latents that others made, as batches for a `LatentsWriter`: webdataset shards.

Such files do not say what their values are; `values` does:

    "latents"       latents                                                            C channels
    "moments"       mean and standard deviation of the VAE's posterior                 2C
    "mean_logvar"   mean and logarithm of the variance, as in MaskDiT and U-ViT        2C

Shapes: B batch, C latent channels, M channels of a record, S side of the latents.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .latents import LatentsInfo


VALUES = ("latents", "moments", "mean_logvar")


class Record(NamedTuple):
    name: str
    values: np.ndarray
    """[M, S, S]."""
    label: int


def read_webdataset(
    tar: str | Path, *, latent_member: str = "latent.npy", label_member: str = "cls"
) -> Iterator[Record]:
    """The records of one shard, in order. Nothing is unpickled.

    Args:
        tar: A shard; files of one record follow each other and share their name up to the first dot.
        latent_member: What follows that dot for the array, [M, S, S] or [1, M, S, S] in NumPy's format.
        label_member: What follows it for the class label, an integer as text.

    Raises:
        ValueError: No readable tar, or a record without such members, with its name.
    """
    try:
        with tarfile.open(tar) as archive:
            files = (member for member in archive if member.isfile())
            for key, members in groupby(files, key=lambda member: _split(member.name)[0]):
                content = {_split(member.name)[1]: archive.extractfile(member).read() for member in members}
                yield _decode(f"{key} of {tar}", content, latent_member, label_member)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"Expected a whole tar file, got {tar} ({error}). Fetch it again.") from error


def to_batches(
    records: Iterable[Record], *, values: str, info: LatentsInfo, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Records as batches for `LatentsWriter.write`.

    Args:
        records: As read.
        values: What they hold, see above.
        info: Of the folder to write.
        batch_size: B.

    Raises:
        ValueError: A record of another shape than the folder's or with a label outside its classes, with its name.
    """
    records = iter(records)
    while batch := list(islice(records, batch_size)):
        for record in batch:
            if record.values.shape != info.shape:
                raise ValueError(
                    f"Expected latents {list(info.shape)}, got {list(record.values.shape)} for {record.name}."
                )
            if not 0 <= record.label < len(info.id2label):
                raise ValueError(
                    f"Expected labels in [0, {len(info.id2label)}), got {record.label} for {record.name}."
                )
        moments = torch.from_numpy(np.stack([record.values for record in batch])).float()
        if values == "mean_logvar":
            mean, logvar = moments.chunk(2, dim=1)
            # The range is that of diffusers' DiagonalGaussianDistribution.
            moments = torch.cat([mean, (0.5 * logvar.clamp(-30.0, 20.0)).exp()], dim=1)
        names, labels = [record.name for record in batch], [record.label for record in batch]
        yield {"names": names, "unreadable": [], "moments": moments, "label": labels}


def _split(name: str) -> tuple[str, str]:
    """The name of a record's file up to the first dot of its last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    key, _, member = last.partition(".")
    return f"{folder}{slash}{key}", member


def _decode(name: str, content: dict[str, bytes], latent_member: str, label_member: str) -> Record:
    if missing := sorted({latent_member, label_member} - set(content)):
        raise ValueError(
            f"Expected members {latent_member!r} and {label_member!r} in each record, got {sorted(content)} without "
            f"{missing} for {name}. Name the members that there are."
        )
    try:
        values = np.load(io.BytesIO(content[latent_member]), allow_pickle=False)
        label = int(content[label_member])
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"Expected a NumPy array and an integer label, got something else for {name} ({error}). Pickles are not "
            "read, because they can run code: save arrays with numpy.save."
        ) from error
    values = values[0] if values.ndim == 4 and len(values) == 1 else values
    if values.ndim != 3 or values.dtype.kind != "f":
        raise ValueError(f"Expected latents [M, S, S], got {values.dtype} {list(values.shape)} for {name}.")
    return Record(name, values, label)
