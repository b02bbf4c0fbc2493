# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Training data by name: `digits:`, `folder:PATH`, `hub:NAME`, `latents:PATH`, or a kind of your own."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel

from ..fingerprint import weights_fingerprint
from ..hub_errors import ADVICE, LOST
from ..registry import add_entry
from .buckets import Buckets
from .latents import LatentCodec, LatentsInfo, check_vae, encode_images, latent_codec, latents_from_moments
from .loading import TrainingData, make_batches, open_training_data


class TrainingSource:
    """The data of a training run: batches, and the latents and conditions that a denoiser gets from them.

    This class is for images, as pixels or as latents of a VAE. For another kind of source, write a subclass, or any
    class with these methods and attributes, and register it: `register_source("name", open_it)`.

    Args:
        dataset: A data set from `open_training_data`.
        vae: VAE that encodes the images; None to train on pixels.
        name: Name for model cards, a repository on the Hub; None for data on this machine.

    Raises:
        ValueError: As for `check_vae`; the VAE cannot encode the sizes of the buckets.
    """

    info: LatentsInfo | None = None
    """Description of stored latents."""
    has_images = True
    """Whether `images` returns the images of a batch."""
    has_captions = False
    """Whether batches have captions instead of class labels; then `num_classes` is 0."""
    buckets: Buckets | None = None
    """Sizes of the images; None for squares of `resolution`."""

    def __init__(self, dataset: TrainingData, *, vae=None, name: str | None = None):
        self.dataset, self.vae, self.name = dataset, vae, name
        self.id2label, self.num_classes, self.resolution = dataset.id2label, dataset.num_classes, dataset.resolution
        self.has_captions = getattr(dataset, "captions", None) is not None
        self.buckets = getattr(dataset, "buckets", None)
        self.channels, self.latent_size = dataset.channels, dataset.resolution
        """Shape of the denoiser's input: [channels, latent_size, latent_size]; with buckets, of their longest side."""
        if vae is not None:
            _, self.channels, self.latent_size = check_vae(vae, dataset.resolution)
            factor = dataset.resolution // self.latent_size
            if wrong := [size for size in self.sizes if any(side % factor for side in size)]:
                raise ValueError(
                    f"Expected buckets with sides that are multiples of the VAE's downsampling {factor}, got {wrong}."
                )

    def __len__(self) -> int:
        """Samples in an epoch. Raises TypeError for a stream."""
        return len(self.dataset)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The possible (height, width) of images, in pixels; all images of a batch have the same."""
        return ((self.resolution, self.resolution),) if self.buckets is None else self.buckets.sizes

    def identity(self) -> dict[str, Any]:
        """What identifies these data independently of their path (JSON): a part of the run's settings."""
        return {}

    def batches(self, **options: Any) -> Iterator[dict[str, Any]]:
        """The endless batches of one process; options as for `make_batches`."""
        return make_batches(self.dataset, **options)

    def to_latents(self, batch: dict[str, Any], *, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        """The denoiser's input, [B, C, H, W] on the device, without waiting for the copy."""
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        return pixel_values if self.vae is None else encode_images(self.vae, pixel_values, generator=generator)

    def images(self, batch: dict[str, Any], *, device: torch.device) -> torch.Tensor:
        """The images of a batch, [B, 3 or 1, height, width] in [-1, 1] on the device, if the source `has_images`."""
        return batch["pixel_values"].to(device, non_blocking=True)

    def image_features(self, batch: dict[str, Any], *, device: torch.device) -> torch.Tensor:
        """The stored features of the images, [B, N, E] on the device. Needs `batches(features=True)`."""
        return batch["features"].to(device, non_blocking=True)

    def conditions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's conditions by the names of its arguments, on the CPU: class labels, or captions."""
        name = "captions" if self.has_captions else "class_labels"
        return {name: batch[name]}


class LatentsSource(TrainingSource):
    """Latents stored by `LatentsWriter`, see `TrainingSource`. The VAE is only used to decode samples."""

    has_images = False

    def __init__(self, dataset: TrainingData, *, vae=None, name: str | None = None):
        super().__init__(dataset, name=name)
        self.vae, self.info = vae, dataset.info
        self.channels, self.latent_size = dataset.info.latent_channels, dataset.info.latent_size
        self.buckets = Buckets(dataset.info.sizes) if dataset.info.latent_sizes else None
        self.empty_text = dataset.empty_text
        """The encoded empty caption, in the format of `conditions(batch)["text"]`; None without stored text."""

    def identity(self) -> dict[str, Any]:
        codec = [self.info.shift_factor, self.info.scaling_factor, self.info.latents_mean, self.info.latents_std]
        content = [self.info.kind, *codec, [shard["sha256"] for shard in self.info.shards]]
        return {"latents": hashlib.sha256(json.dumps(content).encode()).hexdigest()}

    def batches(self, *, features: bool = False, **options: Any) -> Iterator[dict[str, Any]]:
        return make_batches(self.dataset.with_features() if features else self.dataset, **options)

    def to_latents(self, batch: dict[str, Any], *, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        moments = batch["moments"].to(device, non_blocking=True)
        return latents_from_moments(moments, self.info, generator=generator)

    def conditions(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().conditions(batch) | ({"text": batch["text"]} if "text" in batch else {})


def open_source(data: str, **options: Any) -> TrainingSource:
    """Opens and checks training data by name.

    Args:
        data: "kind:name" with a kind from `SOURCES`.
        **options: Options of `open_training_data`, such as `captions` and `buckets`, and
            `pretrained_vae_name_or_path`, which may also be a VAE itself. A kind refuses options that it cannot use.

    Raises:
        ValueError: The kind is unknown; as for the function of the kind.
    """
    kind, colon, name = data.partition(":")
    if not colon or kind not in SOURCES:
        raise ValueError(f"Expected data as {', '.join(f'{kind}:NAME' for kind in SOURCES)}, got {data!r}.")
    if not name and kind != "digits":
        raise ValueError(f"Expected a name after {data!r}, such as {kind}:NAME.")
    return SOURCES[kind](name, **options)


def _open_digits(name: str, *, pretrained_vae_name_or_path=None, **options: Any) -> TrainingSource:
    if name or pretrained_vae_name_or_path:
        raise ValueError(f"Expected 'digits:' alone, got {name!r} and VAE {pretrained_vae_name_or_path!r}. Drop them.")
    return TrainingSource(open_training_data(**options), name="scikit-learn's digits")


def _open_folder(name: str, *, pretrained_vae_name_or_path=None, **options: Any) -> TrainingSource:
    return TrainingSource(
        open_training_data(train_data_dir=name, **options), vae=_load_vae(pretrained_vae_name_or_path)
    )


def _open_hub(name: str, *, pretrained_vae_name_or_path=None, **options: Any) -> TrainingSource:
    dataset, public = open_training_data(name, **options), None if Path(name).exists() else name
    return TrainingSource(dataset, vae=_load_vae(pretrained_vae_name_or_path), name=public)


def _open_latents(name: str, *, pretrained_vae_name_or_path=None, num_classes=None, **options: Any) -> TrainingSource:
    # Latents.
    dataset = open_training_data(latents_dir=name, **options)
    info = dataset.info
    if num_classes not in (None, dataset.num_classes):
        raise ValueError(f"Expected num_classes {dataset.num_classes}, those of {name}, got {num_classes}.")

    # The VAE that made them.
    place = {}
    if pretrained_vae_name_or_path is None:
        pretrained_vae_name_or_path = info.vae["name_or_path"]
        place = {key: info.vae[key] for key in ("subfolder", "revision") if info.vae.get(key) is not None}
    vae = _load_vae(pretrained_vae_name_or_path, **place)
    if weights_fingerprint(vae) != info.vae["fingerprint"]:
        raise ValueError(
            f"Expected the VAE that made the latents of {name} ({info.vae['name_or_path']}), got one with other "
            f"weights from {pretrained_vae_name_or_path}. Name the right one with --pretrained_vae_name_or_path."
        )
    # Latents may be stored normalised, with a codec that does nothing; any other codec must be the VAE's.
    if info.codec not in (LatentCodec(), latent_codec(vae)):
        raise ValueError(
            f"Expected a VAE that normalises as the latents of {name} say ({info.codec}), got {latent_codec(vae)} in "
            f"the config of {pretrained_vae_name_or_path}. Name the right one with --pretrained_vae_name_or_path."
        )
    images = info.source.get("dataset_name")
    return LatentsSource(dataset, vae=vae, name=None if images is None or Path(images).exists() else images)


def _load_vae(name: str | torch.nn.Module | None, **place: Any):
    if name is None or isinstance(name, torch.nn.Module):
        return name
    try:
        return AutoModel.from_pretrained(name, **place, use_safetensors=True).requires_grad_(False).eval()
    except LOST as error:
        raise ValueError(
            f"Expected a VAE at {name!r}, got none ({error}). {ADVICE} Say with --pretrained_vae_name_or_path if it "
            "lies elsewhere."
        ) from error


SOURCES: dict[str, Callable[..., TrainingSource]] = {
    "digits": _open_digits,
    "folder": _open_folder,
    "hub": _open_hub,
    "latents": _open_latents,
}


def register_source(kind: str, opener: Callable[..., TrainingSource]) -> None:
    """Registers a kind of data, `--data kind:name`, opened by `opener(name, **options)`, see `open_source`.

    Raises:
        ValueError: The kind is taken.
    """
    add_entry(SOURCES, kind, opener)
