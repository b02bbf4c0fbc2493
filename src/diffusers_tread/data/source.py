# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a model is trained on, by one name: `digits:`, `folder:PATH`, `hub:NAME`, `latents:PATH`, or your own."""

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
    """Data of a training run: batches, and what of a batch a denoiser is trained on and told.

    This one is of images, as pixels or as latents of a VAE. A source of another kind is a subclass, or any class with
    these methods and attributes, and one line: `register_source("name", open_it)`.

    Args:
        dataset: As `open_training_data` gives it.
        vae: What encodes its images; None to train on pixels.
        name: For model cards: a repository of the Hub; None for data of this machine.

    Raises:
        ValueError: What `check_vae` refuses, and buckets that the VAE cannot encode.
    """

    info: LatentsInfo | None = None
    """Of stored latents."""
    has_images = True
    """Whether `images` gives what the batches show."""
    has_captions = False
    """Whether batches have captions instead of class labels; `num_classes` is 0 then."""
    buckets: Buckets | None = None
    """Sizes of the images; None for squares of `resolution`."""

    def __init__(self, dataset: TrainingData, *, vae=None, name: str | None = None):
        self.dataset, self.vae, self.name = dataset, vae, name
        self.id2label, self.num_classes, self.resolution = dataset.id2label, dataset.num_classes, dataset.resolution
        self.has_captions = getattr(dataset, "captions", None) is not None
        self.buckets = getattr(dataset, "buckets", None)
        self.channels, self.latent_size = dataset.channels, dataset.resolution
        """Shape of what the denoiser sees: [channels, latent_size, latent_size], the longest side with buckets."""
        if vae is not None:
            _, self.channels, self.latent_size = check_vae(vae, dataset.resolution)
            factor = dataset.resolution // self.latent_size
            if wrong := [size for size in self.sizes if any(side % factor for side in size)]:
                raise ValueError(
                    f"Expected buckets with sides that are multiples of the VAE's downsampling {factor}, got {wrong}."
                )

    def __len__(self) -> int:
        """Samples of an epoch; TypeError for a stream."""
        return len(self.dataset)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of what batches can be; within one batch all images have one of them."""
        return ((self.resolution, self.resolution),) if self.buckets is None else self.buckets.sizes

    def identity(self) -> dict[str, Any]:
        """What tells these data from others, wherever they lie (JSON): part of the run's settings."""
        return {}

    def batches(self, **options: Any) -> Iterator[dict[str, Any]]:
        """The endless batches of one process, see `make_batches`, whose options these are."""
        return make_batches(self.dataset, **options)

    def to_latents(self, batch: dict[str, Any], *, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        """What the denoiser is trained on, [B, C, H, W] on the device; nothing waits for it."""
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        return pixel_values if self.vae is None else encode_images(self.vae, pixel_values, generator=generator)

    def images(self, batch: dict[str, Any], *, device: torch.device) -> torch.Tensor:
        """The images of a batch, [B, 3 or 1, height, width] in [-1, 1] on the device, if it `has_images`."""
        return batch["pixel_values"].to(device, non_blocking=True)

    def image_features(self, batch: dict[str, Any], *, device: torch.device) -> torch.Tensor:
        """What was stored of the images, [B, N, E] on the device, of `batches(features=True)` where `info` has it."""
        return batch["features"].to(device, non_blocking=True)

    def conditions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the denoiser is told, by the names of its arguments, on the CPU; of data with captions these."""
        name = "captions" if self.has_captions else "class_labels"
        return {name: batch[name]}


class LatentsSource(TrainingSource):
    """Latents that were stored with `LatentsWriter`, see `TrainingSource`; the VAE decodes samples."""

    has_images = False

    def __init__(self, dataset: TrainingData, *, vae=None, name: str | None = None):
        super().__init__(dataset, name=name)
        self.vae, self.info = vae, dataset.info
        self.channels, self.latent_size = dataset.info.latent_channels, dataset.info.latent_size
        self.buckets = Buckets(dataset.info.sizes) if dataset.info.latent_sizes else None
        self.empty_text = dataset.empty_text
        """The empty caption as `conditions(batch)["text"]` has captions; None without stored text."""

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
    """Opens what a name stands for and checks it.

    Args:
        data: "kind:name" with a kind of `SOURCES`.
        **options: Those of `open_training_data`, such as `captions` and `buckets`, and `pretrained_vae_name_or_path`,
            which may be a VAE itself. A kind refuses what it has no use for.

    Raises:
        ValueError: There is no such kind; what its function refuses.
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
    dataset = open_training_data(latents_dir=name, **options)
    info = dataset.info
    if num_classes not in (None, dataset.num_classes):
        raise ValueError(f"Expected num_classes {dataset.num_classes}, those of {name}, got {num_classes}.")
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
    # Latents that were normalised elsewhere need no codec to train on; any other one must be the VAE's.
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
    """Adds a kind of data, `--data kind:name`, opened by `opener(name, **options)`, see `open_source`.

    Raises:
        ValueError: The kind is taken.
    """
    add_entry(SOURCES, kind, opener)
