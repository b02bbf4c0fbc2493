# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reads folders of latents (info.py shows the layout) from disk or from the Hub, downloaded or streamed.

A batch is {"moments": [B, M, S, S] of the stored dtype, "class_labels": [B] int64, "corrupt": []};
`latents_from_moments` converts moments to a denoiser's latents. With captions, a batch has B texts in "captions"
instead of labels, and in "text" the stored arrays of each caption, if there are any (text.py). With aspect-ratio
buckets, moments are [B, M, H, W]. A data set `with_features` adds "features" [B, N, E] of the stored dtype, for the
same image, mirrored or not, as the moments (features.py). The letters of the shapes are explained in codec.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch.utils.data import Dataset

from ...seeds import derive_seed
from ..captions import CaptionColumns
from ..streaming import LOST, StreamingDataset
from .arrow import RECORD_BATCH, find_misfit, open_shard
from .codec import sample_moments
from .features import COLUMNS, FeatureReading
from .info import INFO, LatentsInfo
from .text import EMPTY, read_arrays
from .writing import verify_latents


class LatentsDataset(FeatureReading, Dataset):
    """A memory-mapped folder of latents: only requested records are read, and no copy stays in memory.

    It is read by whole batches of keys (epoch, index), because the flip depends on both. It is safe in forked and
    spawned `DataLoader` workers.

    Args:
        folder: The complete folder: `latents.json` and every shard that it lists.
        seed: The run's seed.
        random_flip: Whether to take the mirrored image's latents at random.
        captions: The caption columns to read instead of labels.

    Raises:
        ValueError: `latents.json` is inconsistent; a shard is missing, cut off, damaged or differs from its
            description (checksums are only compared by `verify_latents`); labels are outside [0, num_classes);
            `random_flip` is set, but there are no mirrored latents; captions are missing.
    """

    def __init__(
        self, folder: str | Path, *, seed: int, random_flip: bool = False, captions: CaptionColumns | None = None
    ):
        import datasets

        self.info = info = verify_latents(folder, checksums=False)
        self.id2label = {} if captions else info.id2label
        self.num_classes = len(self.id2label)
        self.channels, self.resolution = info.latent_channels, info.resolution
        self.seed, self.random_flip, self.captions = seed, random_flip, captions
        _check_flip(info, random_flip)
        _check_captions(info, captions)
        self.empty_text = info.text.load_empty(folder) if info.text else None

        # Shards.
        shards = [open_shard(folder, shard, info) for shard in info.shards]
        self.source = datasets.concatenate_datasets(shards).with_format("arrow")
        schema = info.features().arrow_schema
        self.dtype = schema.field("moments").type.value_type.to_pandas_dtype()

        # Sizes; all records of a batch have the same.
        self.bucket_ids = None
        if info.latent_sizes:
            places = [info.latent_sizes.index(tuple(shard["latent_size"])) for shard in info.shards]
            self.bucket_ids = np.repeat(places, [shard["num_samples"] for shard in info.shards])

        # Labels.
        if not captions:
            labels = self.source.data.column("label").to_numpy()
            if not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise ValueError(
                    f"Expected labels in [0, {self.num_classes}), got [{labels.min()}, {labels.max()}] in {folder}."
                )

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        # Flips and space for the values.
        indices = np.array([index for _, index in keys])
        flips = np.array([self.random_flip and derive_seed(self.seed, "flip", *key) % 2 == 1 for key in keys])
        shape = self.info.record_shape(0 if self.bucket_ids is None else self.bucket_ids[indices[0]])
        moments, labels = np.empty((len(keys), *shape), self.dtype), np.empty(len(keys), np.int64)
        features: Any = None
        stored = self.info.patch_features
        if self.reads_features:
            features = torch.empty(len(keys), *stored.shape(shape[1:]), dtype=stored.torch_dtype)

        # Read latents, labels and features, each mirrored or not.
        for column, rows in (("moments", np.flatnonzero(~flips)), ("moments_flipped", np.flatnonzero(flips))):
            if len(rows) > 0:
                records = self.source[indices[rows]]  # slices of the memory map: only what is copied is read
                moments[rows] = _as_array(records[column], shape)
                if not self.captions:
                    labels[rows] = records["label"]
                if self.reads_features:
                    column = COLUMNS[column == "moments_flipped"]
                    features[torch.from_numpy(rows)] = stored.unpack(records[column], shape[1:])

        # The batch, with captions instead of labels if wanted.
        batch = {"moments": _as_tensor(moments, self.info), "corrupt": []}
        batch |= {"features": features} if self.reads_features else {}
        if not self.captions:
            return batch | {"class_labels": torch.from_numpy(labels)}
        places = [{"seed": self.seed, "epoch": epoch, "place": index} for epoch, index in keys]
        return batch | _read_captions(self.source[indices], self.captions, places, self.info)


class StreamingLatentsDataset(FeatureReading, StreamingDataset):
    """A folder or repository of latents as a stream.

    Args:
        source: A streamed `datasets` data set of the shards.
        info: Description of the shards.
        captions: The caption columns to read instead of labels.
        empty_text: Arrays of the empty caption, if the folder has them.
        **options: `seed`, `random_flip` and `shuffle_buffer`, see `StreamingDataset`.

    Raises:
        ValueError: `random_flip` is set, but there are no mirrored latents; captions are missing.
    """

    value = "moments"

    def __init__(
        self,
        source,
        *,
        info: LatentsInfo,
        random_flip: bool = False,
        captions: CaptionColumns | None = None,
        empty_text: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ):
        _check_flip(info, random_flip)
        _check_captions(info, captions)
        super().__init__(
            source.with_format("arrow"),
            id2label={} if captions else info.id2label,
            resolution=info.resolution,
            random_flip=random_flip,
            **options,
        )
        self.info, self.channels, self.captions, self.empty_text = info, info.latent_channels, captions, empty_text

    def records(self, source) -> Iterator[Any]:
        # Read many records at once as Arrow tables: one by one or as Python lists, `datasets` is far slower.
        tables = iter(source.iter(batch_size=RECORD_BATCH))
        while True:
            try:
                table = next(tables, None)
                if table is not None and (fault := find_misfit(table, self.info)):
                    raise ValueError(f"it {fault}")
            except (ValueError, TypeError, KeyError) as error:  # raised by pyarrow and `datasets` for other columns
                raise ValueError(
                    f"Expected shards as {INFO} describes them, got one that cannot be read ({error}). Download the "
                    "data set and name it with examples/precompute_latents.py --verify, or make it again."
                ) from error
            if table is None:
                return
            yield from (table.slice(row, 1) for row in range(len(table)))

    def read(self, record, *, name: str, flip: bool) -> dict[str, Any]:
        shape = self.info.shape
        if self.info.latent_sizes:
            shape = (shape[0], *(record[side][0].as_py() for side in ("height", "width")))
        item = {"moments": _as_array(record["moments_flipped" if flip else "moments"], shape)[0]}
        if self.reads_features:
            item["features"] = self.info.patch_features.unpack(record[COLUMNS[flip]], shape[1:])[0]
        return item if self.captions else item | {"class_labels": record["label"][0].as_py()}

    def read_caption(self, record, **place: int) -> dict[str, Any]:
        if not self.captions:
            return {}
        return _read_captions(record, self.captions, [{"seed": self.seed, **place}], self.info)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {"moments": _as_tensor(np.stack([item["moments"] for item in items]), self.info)}
        if self.reads_features:
            batch["features"] = torch.stack([item["features"] for item in items])
        if not self.captions:
            return batch | {"class_labels": torch.tensor([item["class_labels"] for item in items], dtype=torch.int64)}
        names = ("captions", "text") if self.info.text else ("captions",)
        return batch | {name: [value for item in items for value in item[name]] for name in names}


def open_latents(
    name: str | Path,
    *,
    seed: int = 0,
    random_flip: bool = False,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    cache_dir: str | None = None,
    captions: CaptionColumns | None = None,
) -> LatentsDataset | StreamingLatentsDataset:
    """Opens latents and checks them before any work starts.

    Args:
        name: A folder or, if there is no such folder, a data set on the Hub, "org/name".
        seed: Seed of the flips and of a stream's order.
        random_flip: Whether to take the mirrored image's latents at random.
        streaming: Whether to read a data set on the Hub without downloading it first, or a folder in sequence.
        shuffle_buffer: Records held in memory to shuffle a stream.
        cache_dir: Where downloads are kept.
        captions: The caption columns to read instead of labels.

    Raises:
        ValueError: There is no such folder or data set, or the Hub cannot be reached; as for `LatentsDataset`, but
            errors in the records of a stream are only raised when they are read.
    """
    import datasets

    # Memory-mapped.
    common = {"seed": seed, "random_flip": random_flip, "captions": captions}
    folder, is_local = Path(name), Path(name).is_dir()
    if not streaming:
        if not is_local:
            patterns = [INFO, EMPTY, "*.arrow"]
            folder = _ask_hub(
                snapshot_download, name, repo_type="dataset", allow_patterns=patterns, cache_dir=cache_dir
            )
        return LatentsDataset(folder, **common)

    # The shards of a stream, in a folder or on the Hub.
    if is_local:
        info = verify_latents(folder, checksums=False)
        for shard in info.shards:
            open_shard(folder, shard, info)
        files = [str(folder / shard["file"]) for shard in info.shards]
    else:
        # Read everything from one commit, because the repository may change in the meantime.
        repo = _ask_hub(HfApi().dataset_info, name, files_metadata=True)
        options = {"repo_type": "dataset", "revision": repo.sha, "cache_dir": cache_dir}
        info = LatentsInfo.load(Path(_ask_hub(hf_hub_download, name, filename=INFO, **options)).parent)
        there = {file.rfilename: file for file in repo.siblings}
        if wrong := [shard["file"] for shard in info.shards if not _is_same(there.get(shard["file"]), shard)]:
            raise ValueError(
                f"Expected the shards of {name} as {INFO} describes them, got {wrong} missing, cut off or changed. "
                "Upload them again."
            )
        files = [f"hf://datasets/{name}@{repo.sha}/{shard['file']}" for shard in info.shards]
        if info.text is not None:
            folder = Path(_ask_hub(hf_hub_download, name, filename=EMPTY, **options)).parent

    # The stream.
    source = datasets.load_dataset(
        "arrow",
        data_files={"train": files},
        split="train",
        streaming=True,
        features=info.features(),
        cache_dir=cache_dir,
    )
    empty_text = info.text.load_empty(folder) if info.text else None
    return StreamingLatentsDataset(source, info=info, empty_text=empty_text, shuffle_buffer=shuffle_buffer, **common)


def latents_from_moments(
    moments: torch.Tensor, info: LatentsInfo, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Converts stored moments to a denoiser's latents: samples the posterior and normalises.

    Args:
        moments: Moments [B, M, S, S] of the stored dtype.
        info: Description of the folder that they come from.
        generator: Source of randomness for the posterior sample.

    Returns:
        Latents [B, C, S, S], float32.
    """
    moments = moments.float()
    return info.codec.normalize(sample_moments(moments, generator=generator) if info.kind == "moments" else moments)


def _is_same(file, shard: dict[str, Any]) -> bool:
    """Whether a file of a repository is this shard, by its size and, for large files, the Hub's checksum."""
    return file is not None and file.size == shard["size"] and (file.lfs is None or file.lfs.sha256 == shard["sha256"])


def _ask_hub(request, name: str | Path, **options: Any) -> Any:
    """Calls a function of huggingface_hub for a data set, and turns its errors into one ValueError."""
    try:
        return request(str(name), **options)
    except (ValueError, *LOST) as error:  # ValueError: the name is not valid
        raise ValueError(
            f"Expected a folder of latents or a data set on the Hub, got {str(name)!r}: there is no such folder, and "
            "the Hub did not give it. If it should be there, check the name, the network and `hf auth login`, and run "
            f"the same command again: what was downloaded is kept. The cause: {error}"
        ) from error


def _check_flip(info: LatentsInfo, random_flip: bool) -> None:
    if random_flip and not info.has_flipped:
        raise ValueError(
            "Expected latents of mirrored images for random_flip, got latents made without. Make them with --flip, or "
            "leave random_flip off."
        )


def _check_captions(info: LatentsInfo, captions: CaptionColumns | None) -> None:
    if captions is None and not info.id2label:
        raise ValueError(f"Expected captions of {list(info.captions)}, got none. Name a --caption_column.")
    if missing := set(captions.names if captions else ()) - set(info.captions):
        raise ValueError(
            f"Expected captions among {list(info.captions)}, those of these latents, got {sorted(missing)}. Make them "
            "with examples/precompute_latents.py --caption_column."
        )


def _read_captions(table, captions: CaptionColumns, places: list[dict[str, int]], info: LatentsInfo) -> dict[str, Any]:
    """Draws a caption for each record of a table, and reads its arrays."""
    names = {name: name for name in captions.names}
    columns = [captions.choose(names, **place) for place in places]
    texts = [table.column(column)[row].as_py() for row, column in enumerate(columns)]
    return {"captions": texts} | ({"text": read_arrays(table, columns, info.text)} if info.text else {})


def _as_array(column, shape: Sequence[int]) -> np.ndarray:
    """Converts an Arrow column of n records to [n, *shape]; it is not copied if it has one chunk."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, *shape)


def _as_tensor(values: np.ndarray, info: LatentsInfo) -> torch.Tensor:
    """Converts stored values to a tensor of the folder's dtype; bfloat16 is stored as its bits."""
    return torch.from_numpy(values).view(info.torch_dtype)
