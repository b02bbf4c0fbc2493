# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Batches of latents as Arrow tables, and what is looked at when they are read back.

The letters of the shapes are those of codec.py.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .info import INFO, LatentsInfo


# Rows per record batch: few enough that a random read touches little, many enough to find it quickly.
RECORD_BATCH = 64


def to_table(batch: dict[str, Any], info: LatentsInfo):
    """A batch as a `pyarrow.Table` in the dtype of its folder.

    Args:
        batch: `moments` (and `moments_flipped`) [B, M, S, S], `label` [B] and B `names`.
        info: Of the folder.

    Raises:
        ValueError: A value that is not finite in that dtype, with the image's name.
    """
    import pyarrow as pa

    schema = info.features().arrow_schema
    columns = {"label": pa.array(np.asarray(batch["label"], dtype=np.int64))}
    for column in set(schema.names) - {"label"}:
        values = batch[column].to(info.torch_dtype).flatten(1)  # B M*S*S
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            name = batch["names"][int(finite.int().argmin())]
            raise ValueError(
                f"Expected finite values in {info.dtype}, got others for {name}. Write bfloat16 or float32; if that "
                "does not help, run the VAE in float32."
            )
        values = values.cpu().contiguous().view(-1)
        values = values.view(torch.uint16) if info.dtype == "bfloat16" else values
        array = pa.array(values.numpy())
        columns[column] = pa.FixedSizeListArray.from_arrays(array, type=schema.field(column).type)
    return pa.table(columns, schema=schema)


def regroup(tables: Iterable[Any]) -> Iterator[Any]:
    """The rows of some tables in tables of one chunk and a multiple of `RECORD_BATCH` rows, but for the last one."""
    import pyarrow as pa

    rest = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        if whole := rest.num_rows // RECORD_BATCH * RECORD_BATCH:
            yield rest.slice(0, whole).combine_chunks()
            rest = rest.slice(whole)
    if rest is not None and rest.num_rows > 0:
        yield rest.combine_chunks()


def open_shard(folder: str | Path, shard: dict[str, Any], info: LatentsInfo):
    """A shard as a memory-mapped `datasets.Dataset`; its values are not read.

    Raises:
        ValueError: It is damaged, or has other columns or another number of records than `latents.json` says.
    """
    import datasets

    path, schema = Path(folder, shard["file"]), info.features().arrow_schema
    try:
        dataset = datasets.Dataset.from_file(str(path))
        table = dataset.data.table
        table.validate()
        has_nulls = any(column.null_count for column in table.columns)
    except Exception as error:  # pyarrow and `datasets` raise many kinds for foreign bytes
        raise ValueError(
            f"Expected a whole shard, got {path}, which cannot be read ({error}). Fetch it again."
        ) from error
    if len(dataset) != shard["num_samples"] or not table.schema.equals(schema) or has_nulls:
        nulls = ", some of them null" if has_nulls else ""
        raise ValueError(
            f"Expected {shard['num_samples']} records of {schema.names}, as {INFO} says, in {path}, got "
            f"{len(dataset)} of {dataset.column_names}{nulls}. Make the folder again."
        )
    return dataset


def find_fault(path: Path, info: LatentsInfo, *, num_samples: int) -> str | None:
    """Reads a shard and says what is wrong with its columns, records, labels or values, if anything."""
    import pyarrow as pa

    try:
        return _find_fault(path, info, num_samples)
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({error})"


def _find_fault(path: Path, info: LatentsInfo, num_samples: int) -> str | None:
    import pyarrow as pa

    schema, num_rows = info.features().arrow_schema, 0
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        if not stream.schema.equals(schema):
            return "has other columns"
        for batch in stream:
            batch.validate()
            num_rows += batch.num_rows
            if any(column.null_count for column in batch.columns):
                return "has records without values"
            labels = batch.column("label").to_numpy()
            if ((labels < 0) | (labels >= len(info.id2label))).any():
                return f"has labels outside [0, {len(info.id2label)})"
            for name in set(schema.names) - {"label"}:
                if not _is_finite(batch.column(name).flatten().to_numpy()).all():
                    return "has values that are not finite"
    return None if num_rows == num_samples else f"has {num_rows} records"


def _is_finite(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:  # bfloat16: an exponent of ones stands for infinities and NaN
        return (values & 0x7F80) != 0x7F80
    return np.isfinite(values)
