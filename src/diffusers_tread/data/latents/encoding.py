# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Encodes a data set of images to the shards of a folder of latents."""

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


_ROWS = 256  # undecoded rows read at once: one by one, `datasets` takes a hundred times as long


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

    Each shard starts with a new batch, so that its bytes depend neither on the process that writes it nor on the
    shards written before.

    Args:
        writer: Writer of an opened folder.
        shards: The numbers of the shards to write.
        source: A data set from `open_images`, with undecoded images.
        vae: As for `encode_moments`.
        plan: Rows of the source for each shard of the folder, see `plan_shards`; unreadable images are left out.
        image_column: The column of the source with images.
        label_column: The column with class labels, if the folder has labels.
        batch_size: B, images per forward pass.
        encode_captions: `PromptEncoder.encode`, for a folder with `text`.
        encode_features: For a folder with `patch_features`: encodes images [B, 3, height, width], given the height and
            width of their latents, to features [B, N, E].
        background: Colour put behind transparent images, see `load_image`.
        num_workers: Processes that decode images.
        progress: Label of the progress bar; None for no bar.

    Raises:
        ValueError, OSError: As for `LatentsWriter.write`.
    """
    # Decode images, in batches that never cross a shard.
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

    # Encode and write each shard.
    num_images = sum(len(batch) for shard in batches for batch in shard)
    with tqdm(total=num_images, desc=progress, unit="images", disable=progress is None) as bar:
        for shard, its_batches in zip(shards, batches, strict=True):
            records = islice(loader, len(its_batches))
            encoders = {"encode_captions": encode_captions, "encode_features": encode_features}
            records = _encode(vae, records, info=info, label_column=label_column, **encoders)
            writer.write(shard, _counted(records, bar))


def plan_shards(rows_of_sizes: Sequence[Sequence[int]], shard_size: int) -> tuple[list[Sequence[int]], list[int]]:
    """Assigns rows to shards.

    Args:
        rows_of_sizes: The rows of each size of images; one sequence with all rows if there is one size.
        shard_size: Number of rows of a shard; the last shard of a size may have fewer.

    Returns:
        The rows of each shard, and the index of each shard's size.
    """
    plan, places = [], []
    for place, rows in enumerate(rows_of_sizes):
        parts = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
        plan, places = plan + parts, places + [place] * len(parts)
    return plan, places


def digest_sources(source, *, image_column: str, plan: Sequence[Sequence[int]]) -> list[str]:
    """Computes a hash for each shard that changes with its images, for `LatentsWriter.open`.

    Image files are not read: their names, sizes and modification times are hashed. For images stored in the data set
    itself, the content is hashed.

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
    """Rows of a source by key (row, size): `name`, `pixels` [3, H, W] or None if unreadable, and other columns.

    Args:
        source: A data set with undecoded images.
        columns: The column with images, then other columns to return.
        **options: Options of `read_image`.
    """

    def __init__(self, source, columns: Sequence[str], **options: Any):
        self.source, (self.image_column, *self.columns) = source.select_columns(list(columns)), columns
        self.options = options

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> dict[str, Any]:
        row, size = key
        record = self.source[row]
        image = record[self.image_column]
        path = (image or {}).get("path")
        # Only the end of the path, which says nothing about this machine.
        name = f"image {row} ({'/'.join(Path(path).parts[-2:])})" if path else f"image {row}"
        pixels = read_image(image, resolution=size, **self.options)
        return {"name": name, "pixels": pixels, "others": {column: record[column] for column in self.columns}}


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates the readable images to a batch, with the names of the unreadable ones."""
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
    """Encodes batches of images to batches for `to_table`."""
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
