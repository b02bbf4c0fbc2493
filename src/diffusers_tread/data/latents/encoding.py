# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From a data set of images to the shards of a folder of latents."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..images import read_image
from .codec import encode_moments
from .writing import LatentsWriter, digest_files


_ROWS = 256  # that are read at once where none is decoded: one by one takes `datasets` a hundred times as long


def encode_shards(
    writer: LatentsWriter,
    shards: Sequence[int],
    source,
    vae,
    *,
    image_column: str,
    label_column: str,
    shard_size: int,
    batch_size: int,
    background: str = "white",
    num_workers: int = 0,
    progress: str | None = None,
) -> None:
    """Encodes the images of some shards and writes them.

    Batches start anew with each shard, so that the bytes of a shard depend neither on the process that writes it nor
    on what was written before.

    Args:
        writer: Of an opened folder.
        shards: Shard k holds the readable images among k * shard_size .. (k + 1) * shard_size - 1.
        source: A data set as `open_images` returns it, images undecoded.
        vae: As for `encode_moments`.
        image_column: The column of the source with images.
        label_column: The column with class labels.
        shard_size: Images per shard.
        batch_size: B, images per forward.
        background: Colour behind transparent images, see `load_image`.
        num_workers: Processes that decode images.
        progress: What the progress bar says; None for no bar.

    Raises:
        ValueError, OSError: As `LatentsWriter.write`.
    """
    batches = []
    for shard in shards:
        indices = range(shard * shard_size, min((shard + 1) * shard_size, len(source)))
        batches.append([indices[start : start + batch_size] for start in range(0, len(indices), batch_size)])
    loader = iter(
        DataLoader(
            SourceImages(source, image_column, label_column, resolution=writer.info.resolution, background=background),
            batch_sampler=[batch for its_batches in batches for batch in its_batches],
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=vae.device.type == "cuda",
        )
    )
    num_images = sum(len(batch) for shard in batches for batch in shard)
    with tqdm(total=num_images, desc=progress, unit="images", disable=progress is None) as bar:
        for shard, its_batches in zip(shards, batches, strict=True):
            records = _encode(vae, islice(loader, len(its_batches)), flip=writer.info.has_flipped, bar=bar)
            writer.write(shard, records)


def digest_sources(source, *, image_column: str, shard_size: int) -> list[str]:
    """For each shard a hash that changes with its images, for `LatentsWriter.open`.

    Of image files it takes names, sizes and times of change, which reads none of them; of images that lie in the data
    set itself the content.

    Args:
        source: As for `encode_shards`.
        image_column: As for `encode_shards`.
        shard_size: As for `encode_shards`.
    """
    digests = []
    for start in range(0, len(source), shard_size):
        digest, stop = hashlib.sha256(), min(start + shard_size, len(source))
        for row in range(start, stop, _ROWS):
            for image in source[row : min(row + _ROWS, stop)][image_column]:
                content, path = (image or {}).get("bytes"), (image or {}).get("path")
                files = [] if content is not None or path is None else [path]
                digest.update(hashlib.sha256(content or b"").digest() + digest_files(files).encode())
        digests.append(digest.hexdigest())
    return digests


class SourceImages(Dataset):
    """Name, pixels [3, R, R] or None if it cannot be read, and label of the images of a source."""

    def __init__(self, source, image_column: str, label_column: str, **options: Any):
        self.source, self.image_column, self.label_column = source, image_column, label_column
        self.options = options

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | None, int]:
        record = self.source[index]
        image = record[self.image_column]
        path = (image or {}).get("path")
        # As much of the path as says nothing of this machine.
        name = f"image {index} ({'/'.join(Path(path).parts[-2:])})" if path else f"image {index}"
        return name, read_image(image, **self.options), record[self.label_column]


def _collate(items: list[tuple[str, torch.Tensor | None, int]]) -> dict[str, Any]:
    """The readable images as a batch, and the names of the others."""
    good = [item for item in items if item[1] is not None]
    return {
        "names": [name for name, _, _ in good],
        "pixel_values": torch.stack([pixels for _, pixels, _ in good]) if good else None,
        "label": [label for _, _, label in good],
        "unreadable": [name for name, pixels, _ in items if pixels is None],
    }


def _encode(vae, batches: Iterable[dict[str, Any]], *, flip: bool, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Adds the moments to batches of images."""
    for batch in batches:
        if batch["names"]:
            pixels = batch.pop("pixel_values").to(vae.device, non_blocking=True)
            batch["moments"] = encode_moments(vae, pixels)
            if flip:
                batch["moments_flipped"] = encode_moments(vae, pixels.flip(-1))
        yield batch
        bar.update(len(batch["names"]) + len(batch["unreadable"]))
