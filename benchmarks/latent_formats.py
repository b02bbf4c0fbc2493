# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Formats in which records of latents could be stored, for read_latents.py.

`FORMATS` maps a name to (write, open): `write(folder, moments, labels)` stores records [N, V] float16 with labels [N],
`open(folder)` gives a function from indices [B] to the records [B, V] and labels [B]. If a format has no random
access, the function ignores the indices and reads on through a shuffle buffer.
"""

import io
import random
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from diffusers_tread.data import LatentsDataset, LatentsInfo, LatentsWriter
from diffusers_tread.data.latents.importing import read_webdataset


Records = tuple[np.ndarray, np.ndarray]
Read = Callable[[np.ndarray], Records]
NUM_CLASSES, SHARD, BUFFER = 1000, 1024, 1000


def shape_of(moments: np.ndarray) -> tuple[int, int, int]:
    """[8, S, S] of flat records: mean and standard deviation of four channels."""
    side = round((moments.shape[1] / 8) ** 0.5)
    return 8, side, side


def shards(moments: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for number, start in enumerate(range(0, len(moments), SHARD)):
        yield number, moments[start : start + SHARD], labels[start : start + SHARD]


def write_ours(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    side = shape_of(moments)[1]
    info = LatentsInfo(
        kind="moments", dtype="float16", latent_channels=4, latent_size=side, resolution=8 * side, scaling_factor=1.0,
        vae={}, source={}, id2label={label: str(label) for label in range(NUM_CLASSES)}, num_samples=1, shards=(),
    )  # fmt: skip
    writer = LatentsWriter(folder, info, num_shards=-(-len(moments) // SHARD))
    writer.open({})
    for number, values, classes in shards(moments, labels):
        values = torch.from_numpy(values).view(-1, *shape_of(moments))
        writer.write(number, [{"names": classes.tolist(), "unreadable": [], "moments": values, "label": classes}])
    writer.finish()


def open_ours(folder: Path) -> Read:
    dataset = LatentsDataset(folder, seed=0)

    def read(indices: np.ndarray) -> Records:
        batch = dataset.__getitems__([(0, index) for index in indices.tolist()])
        return batch["moments"].flatten(1).numpy(), batch["class_labels"].numpy()

    return read


def write_parquet(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    for number, values, classes in shards(moments, labels):
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        table = pa.table({"moments": column, "label": classes})
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=64)


def open_parquet(folder: Path) -> Read:
    """Read as it lies there: a record costs its row group of 64."""
    files = [pq.ParquetFile(path, memory_map=True) for path in sorted(folder.glob("*.parquet"))]

    def read(indices: np.ndarray) -> Records:
        values, labels = [], []
        for index in indices.tolist():
            shard, row = divmod(index, SHARD)
            group = files[shard].read_row_group(row // 64)
            values.append(group["moments"].chunk(0).slice(row % 64, 1).flatten().to_numpy())
            labels.append(group["label"][row % 64].as_py())
        return np.stack(values), np.array(labels)

    return read


def open_parquet_cached(folder: Path) -> Read:
    """As `datasets` reads Parquet: converted to Arrow in its cache."""
    cache = folder / "cache"
    source = datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(cache))
    source = source.with_format("arrow")

    def read(indices: np.ndarray) -> Records:
        table = source[indices]
        values = table["moments"].combine_chunks().flatten().to_numpy()
        return values.reshape(len(indices), -1), table["label"].to_numpy()

    return read


def write_tars(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    for number, values, classes in shards(moments, labels):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row, (value, label) in enumerate(zip(values, classes, strict=True)):
                file = io.BytesIO()
                np.save(file, value.reshape(shape_of(moments)))
                for member, content in {"latent.npy": file.getvalue(), "cls": str(label).encode()}.items():
                    header = tarfile.TarInfo(f"{number * SHARD + row:07d}.{member}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))


def open_tars(folder: Path) -> Read:
    paths = sorted(folder.glob("*.tar"))

    def shuffled() -> Iterator:
        records = (record for _ in iter(int, 1) for path in paths for record in read_webdataset(path))
        buffer = list(islice(records, BUFFER))
        for record in records:
            place = random.randrange(BUFFER) % len(buffer)
            yield buffer[place]
            buffer[place] = record

    stream = shuffled()

    def read(indices: np.ndarray) -> Records:
        records = list(islice(stream, len(indices)))
        values = np.stack([record.values for record in records])
        return values.reshape(len(records), -1), np.array([record.label for record in records])

    return read


def write_safetensors(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    for number, values, classes in shards(moments, labels):
        save_file({"moments": values, "label": classes}, folder / f"{number:05d}.safetensors")


def open_safetensors(folder: Path) -> Read:
    files = [safe_open(path, "numpy") for path in sorted(folder.glob("*.safetensors"))]
    moments = [file.get_slice("moments") for file in files]
    labels = np.concatenate([file.get_tensor("label") for file in files])

    def read(indices: np.ndarray) -> Records:
        rows = [moments[index // SHARD][index % SHARD : index % SHARD + 1] for index in indices.tolist()]
        return np.concatenate(rows), labels[indices]

    return read


def write_lmdb(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    with lmdb.open(str(folder), map_size=4 * moments.nbytes + 2**24) as environment:
        for number, values, classes in shards(moments, labels):
            with environment.begin(write=True) as transaction:
                for row, (value, label) in enumerate(zip(values, classes, strict=True)):
                    key = b"%07d" % (number * SHARD + row)
                    transaction.put(key, label.tobytes() + value.tobytes(), append=True)


def open_lmdb(folder: Path) -> Read:
    environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    transaction = environment.begin(buffers=True)

    def read(indices: np.ndarray) -> Records:
        records = [transaction.get(b"%07d" % index) for index in indices.tolist()]
        values = np.stack([np.frombuffer(record, np.float16, offset=8) for record in records])
        return values, np.array([np.frombuffer(record, np.int64, count=1)[0] for record in records])

    return read


def write_npy(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    for index, value in enumerate(moments):
        np.save(folder / f"{index:07d}.npy", value)
    np.save(folder / "labels.npy", labels)


def open_npy(folder: Path) -> Read:
    labels = np.load(folder / "labels.npy")

    def read(indices: np.ndarray) -> Records:
        return np.stack([np.load(folder / f"{index:07d}.npy") for index in indices.tolist()]), labels[indices]

    return read


FORMATS = {
    "arrow": (write_ours, open_ours),
    "parquet": (write_parquet, open_parquet),
    "parquet, cached": (write_parquet, open_parquet_cached),
    "safetensors": (write_safetensors, open_safetensors),
    "lmdb": (write_lmdb, open_lmdb),
    "npy files": (write_npy, open_npy),
    "tar, buffered": (write_tars, open_tars),
}
SEQUENTIAL = ("tar, buffered",)
