# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From a data set of images to the shards of a folder of latents."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..images import read_image
from .codec import encode_moments
from .info import LatentsInfo
from .writing import LatentsWriter, digest_files


_ROWS = 256  # that are read at once where none is decoded: one by one takes `datasets` a hundred times as long


def encode_shards(
    writer: LatentsWriter,
    shards: Sequence[int],
    source,
    vae,
    *,
    plan: Sequence[Sequence[int]],
    image_column: str,
    label_column: str,
    batch_size: int,
    encode_captions: Callable[[list[str]], list[dict[str, torch.Tensor]]] | None = None,
    encode_features: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor] | None = None,
    background: str = "white",
    num_workers: int = 0,
    progress: str | None = None,
) -> None:
    """Encodes the images of some shards, and their captions, and writes them.

    Batches start anew with each shard, so that the bytes of a shard depend neither on the process that writes it nor
    on what was written before.

    Args:
        writer: Of an opened folder.
        shards: The numbers of those to write.
        source: A data set as `open_images` returns it, images undecoded.
        vae: As for `encode_moments`.
        plan: For each shard of the folder the rows of the source whose readable images it holds, see `plan_shards`.
        image_column: The column of the source with images.
        label_column: The column with class labels, if the folder has some.
        batch_size: B, images per forward.
        encode_captions: What a folder with `text` stores of captions: `PromptEncoder.encode`.
        encode_features: What a folder with `patch_features` stores of images [B, 3, height, width] with latents of a
            height and width: [B, N, E].
        background: Colour behind transparent images, see `load_image`.
        num_workers: Processes that decode images.
        progress: What the progress bar says; None for no bar.

    Raises:
        ValueError, OSError: As `LatentsWriter.write`.
    """
    info, batches = writer.info, []
    for shard in shards:
        size, rows = info.sizes[writer.size_places[shard]], plan[shard]
        keys = [[(row, size) for row in rows[start : start + batch_size]] for start in range(0, len(rows), batch_size)]
        batches.append(keys)
    columns = [image_column, *([label_column] if info.id2label else []), *info.captions]
    loader = iter(
        DataLoader(
            SourceImages(source, columns, background=background),
            batch_sampler=[batch for its_batches in batches for batch in its_batches],
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=vae.device.type == "cuda",
        )
    )
    num_images = sum(len(batch) for shard in batches for batch in shard)
    with tqdm(total=num_images, desc=progress, unit="images", disable=progress is None) as bar:
        for shard, its_batches in zip(shards, batches, strict=True):
            records = islice(loader, len(its_batches))
            encoders = {"encode_captions": encode_captions, "encode_features": encode_features}
            records = _encode(vae, records, info=info, label_column=label_column, **encoders)
            writer.write(shard, _counted(records, bar))


def plan_shards(rows_of_sizes: Sequence[Sequence[int]], shard_size: int) -> tuple[list[Sequence[int]], list[int]]:
    """The rows of each shard.

    Args:
        rows_of_sizes: For each size of images its rows; all rows in one for images of one size.
        shard_size: Rows of a shard, less in the last one of a size.

    Returns:
        For each shard its rows, and the place of its size.
    """
    plan, places = [], []
    for place, rows in enumerate(rows_of_sizes):
        parts = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
        plan, places = plan + parts, places + [place] * len(parts)
    return plan, places


def digest_sources(source, *, image_column: str, plan: Sequence[Sequence[int]]) -> list[str]:
    """For each shard a hash that changes with its images, for `LatentsWriter.open`.

    Of image files it takes names, sizes and times of change, which reads none of them; of images that lie in the data
    set itself the content.

    Args:
        source: As for `encode_shards`.
        image_column: As for `encode_shards`.
        plan: As for `encode_shards`.
    """
    digests = []
    for rows in plan:
        digest = hashlib.sha256()
        for start in range(0, len(rows), _ROWS):
            for image in source[rows[start : start + _ROWS]][image_column]:
                content, path = (image or {}).get("bytes"), (image or {}).get("path")
                files = [] if content is not None or path is None else [path]
                digest.update(hashlib.sha256(content or b"").digest() + digest_files(files).encode())
        digests.append(digest.hexdigest())
    return digests


class SourceImages(Dataset):
    """Rows of a source by (row, size): `name`, `pixels` [3, H, W] or None if they cannot be read, and other columns.

    Args:
        source: A data set, images undecoded.
        columns: The column with images and those to give beside it.
        **options: Of `read_image`.
    """

    def __init__(self, source, columns: Sequence[str], **options: Any):
        self.source, (self.image_column, *self.columns) = source.select_columns(list(columns)), columns
        self.options = options

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> dict[str, Any]:
        row, size = key
        record = self.source[row]
        image = record[self.image_column]
        path = (image or {}).get("path")
        # As much of the path as says nothing of this machine.
        name = f"image {row} ({'/'.join(Path(path).parts[-2:])})" if path else f"image {row}"
        pixels = read_image(image, resolution=size, **self.options)
        return {"name": name, "pixels": pixels, "others": {column: record[column] for column in self.columns}}


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The readable images as a batch, and the names of the others."""
    good = [item for item in items if item["pixels"] is not None]
    return {
        "names": [item["name"] for item in good],
        "pixel_values": torch.stack([item["pixels"] for item in good]) if good else None,
        "others": {column: [item["others"][column] for item in good] for column in items[0]["others"]},
        "unreadable": [item["name"] for item in items if item["pixels"] is None],
    }


def _encode(
    vae, batches: Iterable[dict[str, Any]], *, info: LatentsInfo, label_column: str, encode_captions, encode_features
) -> Iterator[dict[str, Any]]:
    """Batches of images as `to_table` reads them."""
    for batch in batches:
        encoded, others = {"names": batch["names"], "unreadable": batch["unreadable"]}, batch["others"]
        if batch["names"]:
            pixels = batch["pixel_values"].to(vae.device, non_blocking=True)
            encoded["moments"] = encode_moments(vae, pixels)
            if info.has_flipped:
                encoded["moments_flipped"] = encode_moments(vae, pixels.flip(-1))
            for column, images in zip(info.feature_columns(), (pixels, pixels.flip(-1)), strict=False):
                encoded[column] = encode_features(images, tuple(encoded["moments"].shape[2:]))
            if info.id2label:
                encoded["label"] = others[label_column]
            encoded["captions"] = {caption: others[caption] for caption in info.captions}
            if info.text is not None:
                encoded["text"] = {caption: encode_captions(others[caption]) for caption in info.captions}
        yield encoded


def _counted(batches: Iterable[dict[str, Any]], bar: tqdm) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield batch
        bar.update(len(batch["names"]) + len(batch["unreadable"]))
