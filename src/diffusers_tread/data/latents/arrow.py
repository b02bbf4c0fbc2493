# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts batches of latents to Arrow tables, and checks tables that are read back.

The letters of the shapes are explained in codec.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .info import INFO, LatentsInfo
from .text import from_bytes, to_bytes


# Rows per record batch: few enough for cheap random reads, many enough to find a row quickly.
RECORD_BATCH = 64


def to_table(batch: dict[str, Any], info: LatentsInfo):
    """Converts a batch to a `pyarrow.Table` in the dtype of its folder.

    Args:
        batch: `moments` (and `moments_flipped`) [B, M, H, W] of one size, and B `names`. If the folder has them, also
            `label` [B]; for each caption column, B texts in `captions` and B dicts of arrays in `text`; `features`
            (and `features_flipped`) [B, N, E].
        info: Description of the folder.

    Raises:
        ValueError: A value is not finite in that dtype, a caption is blank, or arrays differ from those of the folder;
            the message names the image.
    """
    import pyarrow as pa

    schema, names = info.features().arrow_schema, batch["names"]
    columns = {}
    if info.id2label:
        columns["label"] = pa.array(np.asarray(batch["label"], dtype=np.int64))

    # Latents.
    height, width = batch["moments"].shape[2:]
    for column, value in (("height", height), ("width", width)) if info.latent_sizes else ():
        columns[column] = pa.array(np.full(len(names), value, dtype=np.int32))
    for column in ("moments", "moments_flipped")[: 1 + info.has_flipped]:
        values = batch[column].to(info.torch_dtype).flatten(1)  # B M*H*W
        advice = "Write bfloat16 or float32; if that does not help, run the VAE in float32."
        _check_finite(values, names=names, advice=advice)
        columns[column] = _to_lists(values, schema.field(column).type)

    # Features.
    for column in info.feature_columns():
        values = batch[column].to(info.patch_features.torch_dtype)
        _check_finite(values, names=names, advice="Store features in bfloat16: --features_dtype bfloat16.")
        packed = info.patch_features.pack(values, (height, width))
        columns[column] = pa.array(packed, type=pa.large_binary())

    # Captions.
    for caption in info.captions:
        if empty := [name for name, text in zip(names, batch["captions"][caption], strict=True) if not text.strip()]:
            raise ValueError(
                f"Expected a caption in column {caption!r}, got none for {empty[0]}. Leave that image out."
            )
        columns[caption] = pa.array(batch["captions"][caption], type=pa.string())
        if info.text is None:
            continue
        records = batch["text"][caption]
        for arrays in records:
            info.text.check(arrays)
        for name, column in info.text.columns(caption).items():
            values = [arrays[name] for arrays in records]
            _check_finite(values, names=names, advice="Run the text encoder in bfloat16 or float32.")
            columns[column] = pa.array(map(to_bytes, values), type=pa.large_binary())
    return pa.table(columns, schema=schema)


def _check_finite(values: Iterable[torch.Tensor], *, names: list[str], advice: str) -> None:
    """Raises ValueError for the first tensor that is not finite, with its name."""
    for name, part in zip(names, values, strict=True):
        if not part.isfinite().all():
            dtype = str(part.dtype).removeprefix("torch.")
            raise ValueError(f"Expected finite values in {dtype}, got others for {name}. {advice}")


def _to_lists(values: torch.Tensor, type):
    """Converts a tensor [B, n] to B lists of an Arrow type; bfloat16 is stored as its bits."""
    import pyarrow as pa

    flat = values.cpu().contiguous().view(-1)
    flat = pa.array((flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy())
    if pa.types.is_fixed_size_list(type):
        return pa.FixedSizeListArray.from_arrays(flat, type=type)
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), flat, type=type)


def regroup(tables: Iterable[Any]) -> Iterator[Any]:
    """Regroups rows to tables of one chunk whose length is a multiple of `RECORD_BATCH`, except for the last one."""
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
    """Opens a shard as a memory-mapped `datasets.Dataset`, without reading its values.

    Raises:
        ValueError: The shard is damaged, or its columns or number of records differ from `latents.json`.
    """
    import datasets

    # Open.
    path, schema = Path(folder, shard["file"]), info.features().arrow_schema
    try:
        dataset = datasets.Dataset.from_file(str(path))
        table = dataset.data.table
        table.validate()
    except Exception as error:  # pyarrow and `datasets` raise many kinds for foreign bytes
        raise ValueError(
            f"Expected a whole shard, got {path}, which cannot be read ({error}). Fetch it again."
        ) from error

    # Compare with the description.
    if len(dataset) != shard["num_samples"] or not table.schema.equals(schema):
        raise ValueError(
            f"Expected {shard['num_samples']} records of {schema.names}, as {INFO} says, in {path}, got "
            f"{len(dataset)} of {dataset.column_names}. Make the folder again."
        )
    if fault := find_misfit(table, info, size=shard.get("latent_size")):
        raise ValueError(f"Expected records as {INFO} says, got {path}, which {fault}. Make the folder again.")
    return dataset


def find_misfit(table, info: LatentsInfo, *, size: Sequence[int] | None = None) -> str | None:
    """Says which lengths of lists, texts or features do not fit the folder, if any, without reading values.

    Args:
        table: A `pyarrow.Table` with the folder's schema.
        info: Description of the folder.
        size: Height and width that all its latents must have; None for any size of the folder.
    """
    import pyarrow.compute as pc

    def lengths(column: str) -> np.ndarray:
        return pc.list_value_length(table.column(column)).to_numpy()

    # Latents.
    if any(column.null_count for column in table.columns):
        return "has records without values"
    heights, widths = info.shape[1:]
    if info.latent_sizes:
        heights, widths = (table.column(name).to_numpy() for name in ("height", "width"))
        found = set(zip(heights.tolist(), widths.tolist(), strict=True))
        if wrong := found - ({tuple(size)} if size else set(info.latent_sizes)):
            return f"has latents of other sizes, {sorted(wrong)[:5]}"
        expected = info.shape[0] * heights.astype(np.int64) * widths
        if any(
            (lengths(column) != expected).any() for column in ("moments", "moments_flipped")[: 1 + info.has_flipped]
        ):
            return "has latents of another length than their height and width say"

    # Features.
    for column in info.feature_columns():
        its_lengths = pc.binary_length(table.column(column)).to_numpy()
        if (its_lengths != info.patch_features.num_bytes(heights, widths)).any():
            return f"has another length of {column!r} than one feature for each patch"

    # Captions. Lengths are differences of offsets: if none is negative, all texts and bytes are inside their buffers.
    for caption in info.captions:
        if (pc.binary_length(table.column(caption)).to_numpy() < 1).any():
            return f"has records without {caption!r}"
        for name, column in (info.text.columns(caption) if info.text else {}).items():
            its_lengths = pc.binary_length(table.column(column)).to_numpy()
            if (its_lengths < 0).any() or (its_lengths % info.text.row_size(name)).any():
                return f"has another length of {column!r} than its shape"
    return None


def find_fault(path: Path, info: LatentsInfo, shard: dict[str, Any]) -> str | None:
    """Reads a shard and says what is wrong with its columns, records, labels, captions or values, if anything."""
    import pyarrow as pa

    try:
        return _find_fault(path, info, shard)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        return f"cannot be read ({error})"


def _find_fault(path: Path, info: LatentsInfo, shard: dict[str, Any]) -> str | None:
    import pyarrow as pa

    schema, num_rows = info.features().arrow_schema, 0
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        if not stream.schema.equals(schema):
            return "has other columns"
        for batch in stream:
            batch.validate()
            num_rows += batch.num_rows
            if fault := find_misfit(batch, info, size=shard.get("latent_size")):
                return fault
            for column in batch.schema.names:
                if fault := _find_wrong_values(batch, column, info):
                    return fault
    return None if num_rows == shard["num_samples"] else f"has {num_rows} records"


def _find_wrong_values(batch, column: str, info: LatentsInfo) -> str | None:
    values = batch.column(column)
    if column in info.captions:
        return None if all(text.strip() for text in values.to_pylist()) else f"has records without {column!r}"
    if column == "label":
        labels = values.to_numpy()
        wrong = ((labels < 0) | (labels >= len(info.id2label))).any()
        return f"has labels outside [0, {len(info.id2label)})" if wrong else None
    if column in ("height", "width"):
        return None
    if column in info.feature_columns():
        dtype = info.patch_features.torch_dtype
        finite = all(from_bytes(value.as_buffer(), dtype).isfinite().all() for value in values)
    elif column in ("moments", "moments_flipped"):
        finite = _is_finite(values.flatten().to_numpy()).all()
    else:
        dtype = info.text.dtype(column.rpartition(".")[2])
        finite = all(from_bytes(value.as_buffer(), dtype).isfinite().all() for value in values)
    return None if finite else "has values that are not finite"


def _is_finite(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:  # bfloat16: infinities and NaN have an exponent of all ones
        return (values & 0x7F80) != 0x7F80
    return np.isfinite(values)
