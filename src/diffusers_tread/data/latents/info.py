# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a folder of latents holds.

A folder of latents, which is a Hub data set as it lies there:

    latents.json                       `LatentsInfo`: what the values are and how to use them
    data/train-00000-of-00128.arrow    Arrow streams: `moments` (and `moments_flipped`), flat, and `label`
    README.md                          the card

The letters of the shapes are those of codec.py.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .codec import LatentCodec


INFO = "latents.json"
# bfloat16 is no Arrow type: its bits are stored as uint16.
_COLUMN_DTYPES = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}
_SHARD_FILE = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.arrow", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_VALUES = 2**31 - 1  # of a record: the length of an Arrow list


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What a folder of latents holds, the content of its `latents.json`.

    Raises:
        ValueError: A kind or dtype that does not exist, a number out of range, a field of another type.
    """

    kind: str
    """"moments": mean and standard deviation of the VAE's posterior, from which training samples; "latents": latents
    themselves, of a VAE without posterior. Both before they are normalised."""
    dtype: str
    """"float16", "bfloat16" or "float32"."""
    latent_channels: int
    """C."""
    latent_size: int
    """S, the side of the square latents."""
    resolution: int
    """Side of the images in pixels."""
    scaling_factor: float
    """How training normalises latents, see `LatentCodec`; 1 with the others absent for values that already are."""
    shift_factor: float = 0.0
    """See `LatentCodec`."""
    latents_mean: tuple[float, ...] | None = None
    """See `LatentCodec`."""
    latents_std: tuple[float, ...] | None = None
    """See `LatentCodec`."""
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
            if not _is_count(getattr(self, name)):
                raise ValueError(f"Expected an integer {name} >= 1, got {getattr(self, name)!r}.")
        channels, height, width = self.shape
        if channels * height * width > _MAX_VALUES:
            raise ValueError(f"Expected records of at most {_MAX_VALUES} values, got {list(self.shape)}.")
        if len(self.codec.latents_mean or [0.0] * self.latent_channels) != self.latent_channels:
            raise ValueError(
                f"Expected latents_mean of the {self.latent_channels} latent_channels, got {self.latents_mean}."
            )
        if sorted(self.id2label) != list(range(len(self.id2label))) or not self.id2label:
            raise ValueError(f"Expected id2label with the classes 0, 1, ..., got {sorted(self.id2label)[:10]}.")
        for name, kind in (("vae", dict), ("source", dict), ("crop", str), ("has_flipped", bool)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"Expected {name} to be a {kind.__name__}, got {getattr(self, name)!r}.")
        for name, kinds in (("id2label", str), ("vae", (str, type(None)))):
            if wrong := [value for value in getattr(self, name).values() if not isinstance(value, kinds)]:
                raise ValueError(f"Expected text in {name}, got {wrong[0]!r}.")

    @property
    def codec(self) -> LatentCodec:
        """How training normalises the values."""
        return LatentCodec(
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            latents_mean=self.latents_mean,
            latents_std=self.latents_std,
        )

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
        """Reads `latents.json` of a folder, which may come from anybody.

        Raises:
            ValueError: There is none, or it is not of this format; shards outside the folder or named twice; counts
                that do not add up.
        """
        path = Path(folder, INFO)
        try:
            values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
            version = values.get("format_version")
            if version != 1 or not _is_count(version):
                raise ValueError(f"format_version is {version!r}, not 1")
            labels = {int(label): name for label, name in values["id2label"].items()}
            if len(labels) != len(values["id2label"]):
                raise ValueError("id2label names a class twice")
            values["id2label"] = labels
            for name in ("shards", "unreadable", "latents_mean", "latents_std"):
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            info = cls(**values)
            _check_shards(info)
            return info
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def _check_shards(info: LatentsInfo) -> None:
    """Raises ValueError for shards and images left out that no writer describes so."""
    if wrong := [name for name in info.unreadable if not isinstance(name, str)]:
        raise ValueError(f"expected names of unreadable images, got {wrong[0]!r}")
    fields, files = {"file", "num_samples", "size", "sha256"}, set()
    for shard in info.shards:
        if not isinstance(shard, dict) or set(shard) != fields:
            raise ValueError(f"expected shards with {sorted(fields)}, got {shard!r}")
        file, digest = shard["file"], shard["sha256"]
        # Plain names, no path out of the folder, no pattern and no address, all of which `datasets` would follow.
        if not isinstance(file, str) or not _SHARD_FILE.fullmatch(file):
            raise ValueError(f"expected shards in the folder, such as data/train-00000-of-00001.arrow, got {file!r}")
        if file in files:
            raise ValueError(f"the shard {file} is named twice")
        files.add(file)
        if not _is_count(shard["num_samples"]) or not _is_count(shard["size"]):
            raise ValueError(f"expected num_samples and size >= 1 of {file}, got {shard!r}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"expected the SHA-256 of {file} in hexadecimal digits, got {digest!r}")
    if (total := sum(shard["num_samples"] for shard in info.shards)) != info.num_samples:
        raise ValueError(f"the shards have {total} records and num_samples is {info.num_samples}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a field stands twice among {[name for name, _ in pairs]}")
    return values
