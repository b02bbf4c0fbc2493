# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From images to the latents that a denoiser is trained on, at once or through a folder of stored ones.

A folder of latents, which is a Hub data set as it lies there:

    latents.json                       `LatentsInfo`: what the values are and how to use them
    data/train-00000-of-00128.arrow    Arrow streams: `moments` (and `moments_flipped`), flat, and `label`
    README.md                          the card

Shapes: B batch, C latent channels, S side of the latents, M values a record: 2C if it holds moments, else C.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


INFO = "latents.json"
# bfloat16 is no Arrow type: its bits are stored as uint16.
_COLUMN_DTYPES = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What a folder of latents holds, the content of its `latents.json`.

    Raises:
        ValueError: A kind or dtype that does not exist, a number out of range.
    """

    kind: str
    """"moments": mean and standard deviation of the VAE's posterior, from which training samples; "latents": latents
    themselves, of a VAE without posterior. Both as the VAE gives them, neither shifted nor scaled."""
    dtype: str
    """"float16", "bfloat16" or "float32"."""
    latent_channels: int
    """C."""
    latent_size: int
    """S, the side of the square latents."""
    resolution: int
    """Side of the images in pixels."""
    scaling_factor: float
    """Training uses (latents - shift_factor) * scaling_factor."""
    shift_factor: float = 0.0
    """See `scaling_factor`."""
    vae: dict[str, Any]
    """`name_or_path`, `revision`, `subfolder`, `class_name` and `fingerprint` (see `weights_fingerprint`) of the VAE,
    and the `dtype` that it encoded in."""
    source: dict[str, Any]
    """Where the images came from: `dataset_name`, `config`, `split`, `revision`, `columns` or `train_data_dir`."""
    crop: str = "center"
    """How images became squares: "center" is `center_crop`."""
    has_flipped: bool = False
    """Whether each record also holds the mirrored image, in `moments_flipped`."""
    id2label: dict[int, str]
    """Names of the classes 0 .. num_classes - 1."""
    num_samples: int
    """Records in all shards."""
    shards: tuple[dict[str, Any], ...]
    """For each shard, in order: `file` (relative to the folder), `num_samples`, `size` in bytes, `sha256`."""
    unreadable: tuple[str, ...] = ()
    """Images of the source that could not be read and are left out."""
    format_version: int = 1
    """Of this description."""

    def __post_init__(self):
        if self.kind not in ("moments", "latents"):
            raise ValueError(f"Expected kind 'moments' or 'latents', got {self.kind!r}.")
        if self.dtype not in _COLUMN_DTYPES:
            raise ValueError(f"Expected dtype {' or '.join(map(repr, _COLUMN_DTYPES))}, got {self.dtype!r}.")
        for name in ("latent_channels", "latent_size", "resolution", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} >= 1, got {getattr(self, name)}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[M, S, S], the shape of one record."""
        channels = self.latent_channels * (2 if self.kind == "moments" else 1)
        return channels, self.latent_size, self.latent_size

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "LatentsInfo":
        """Reads `latents.json` of a folder.

        Raises:
            ValueError: There is none, or it is not of this format.
        """
        path = Path(folder, INFO)
        try:
            values = json.loads(path.read_text())
            if values.get("format_version") != 1:
                raise ValueError(f"format_version is {values.get('format_version')!r}, not 1")
            values["id2label"] = {int(label): name for label, name in values["id2label"].items()}
            values["shards"], values["unreadable"] = tuple(values["shards"]), tuple(values["unreadable"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected a folder of latents with a {INFO}, as examples/precompute_latents.py writes it when it is "
                f"done, got {folder} ({error})."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The content of `latents.json`."""
        return dataclasses.asdict(self)

    def features(self):
        """The columns of a shard, `datasets.Features`."""
        import datasets

        channels, height, width = self.shape
        values = datasets.Sequence(datasets.Value(_COLUMN_DTYPES[self.dtype]), length=channels * height * width)
        columns = {"moments": values} | ({"moments_flipped": values} if self.has_flipped else {})
        names = [self.id2label[label] for label in range(len(self.id2label))]
        # Names need not be unique (ImageNet has two cranes), but those of a ClassLabel must.
        names = names if len(set(names)) == len(names) else [f"{label} {name}" for label, name in enumerate(names)]
        return datasets.Features({**columns, "label": datasets.ClassLabel(names=names)})


def encode_images(vae, pixel_values: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Encodes images with any diffusers image VAE, shifted and scaled as its config says.

    Args:
        vae: An `AutoencoderKL` (a sample of its posterior is taken), `AutoencoderDC`, `AutoencoderTiny` or other model
            whose `encode` returns a posterior or latents.
        pixel_values: [B, 3, H, W] in [-1, 1].
        generator: Source of randomness for the posterior sample.

    Returns:
        [B, C, h, w], `(latents - shift_factor) * scaling_factor`.

    Raises:
        ValueError: `encode` returned neither.
    """
    posterior, latents = _encode(vae, pixel_values)
    latents = posterior.sample(generator) if posterior is not None else latents
    shift, scale = latent_scale(vae)
    return (latents.to(pixel_values.dtype) - shift) * scale


def encode_moments(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a folder of latents stores of images: the moments of the posterior, or the latents of a VAE without one.

    Args:
        vae: As for `encode_images`.
        pixel_values: [B, 3, R, R] in [-1, 1].

    Returns:
        [B, 2C, S, S] float32, mean and standard deviation, or [B, C, S, S]; neither shifted nor scaled.

    Raises:
        ValueError: `encode` returned neither.
    """
    posterior, latents = _encode(vae, pixel_values)
    if posterior is None:
        return latents.float()
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def latents_from_moments(
    moments: torch.Tensor, info: LatentsInfo, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Latents to train on: a sample of the stored posterior, shifted and scaled.

    Args:
        moments: [B, M, S, S] of the stored dtype.
        info: Of the folder that they come from.
        generator: Source of randomness for the posterior sample, on the device of `moments`.

    Returns:
        [B, C, S, S] float32.
    """
    latents = moments.float()
    if info.kind == "moments":
        mean, std = latents.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        latents = mean + std * noise
    return (latents - info.shift_factor) * info.scaling_factor


def latent_scale(vae) -> tuple[float, float]:
    """`shift_factor` and `scaling_factor` of a VAE; 0 and 1 where its config has none."""
    return getattr(vae.config, "shift_factor", None) or 0.0, getattr(vae.config, "scaling_factor", None) or 1.0


def _encode(vae, pixel_values: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
    """The posterior or the latents, whichever this VAE gives."""
    with torch.no_grad():
        encoded = vae.encode(pixel_values.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist, None
    if hasattr(encoded, "latent"):  # AutoencoderDC
        return None, encoded.latent
    if hasattr(encoded, "latents"):  # AutoencoderTiny, VQModel
        return None, encoded.latents
    raise ValueError(f"Expected a VAE whose encode() returns a posterior or latents, got {type(encoded).__name__}.")
