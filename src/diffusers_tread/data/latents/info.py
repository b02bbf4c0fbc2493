# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Describes a folder of latents.

Such a folder can be uploaded unchanged as a Hub data set:

    latents.json                       `LatentsInfo`: what the values are and how to use them
    data/train-00000-of-00128.arrow    Arrow streams: `moments` (and `moments_flipped`), flat, and `label`
    README.md                          the card

Format 2 adds captions, aspect-ratio buckets or a vision encoder's features: columns with captions and their encoding
by a text encoder (text.py), `height` and `width` of the latents, which are the same within a shard, and features of
the images (features.py).

The letters of the shapes are explained in codec.py.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...field_docs import with_field_docs
from .codec import LatentCodec
from .features import COLUMNS, StoredFeatures
from .text import MAX_VALUES, StoredText, is_count


INFO = "latents.json"
# Arrow has no bfloat16: its bits are stored as uint16.
_COLUMN_DTYPES = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}
_SHARD_FILE = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.arrow", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """The description of a folder of latents: the content of its `latents.json`.

    Raises:
        ValueError: The kind or dtype does not exist, a number is out of range, or a field has the wrong type.
    """

    kind: str
    """"moments": mean and standard deviation of the VAE's posterior, which training samples; "latents": the latents
    of a VAE without posterior. Both are stored before normalisation."""
    dtype: str
    """Stored precision: "float16", "bfloat16" or "float32"."""
    latent_channels: int
    """C, channels of the latents."""
    latent_size: int
    """S, the side of the square latents; with `latent_sizes` the longest side."""
    resolution: int
    """Side of the images in pixels; with `latent_sizes` the longest side."""
    scaling_factor: float
    """How training normalises latents, see `LatentCodec`; 1, without the fields below, if they already are."""
    shift_factor: float = 0.0
    """See `LatentCodec`."""
    latents_mean: tuple[float, ...] | None = None
    """See `LatentCodec`."""
    latents_std: tuple[float, ...] | None = None
    """See `LatentCodec`."""
    vae: dict[str, Any]
    """`name_or_path`, `revision`, `subfolder`, `class_name` and `fingerprint` (see `weights_fingerprint`) of the VAE,
    and the `dtype` in which it encoded."""
    source: dict[str, Any]
    """Source of the images: `dataset_name`, `config`, `split`, `revision`, `columns` or `train_data_dir`."""
    crop: str = "center"
    """How images were cropped: "center" stands for `center_crop`."""
    has_flipped: bool = False
    """Whether each record also holds the mirrored image, in `moments_flipped`."""
    id2label: dict[int, str]
    """Names of the classes 0 .. num_classes - 1; empty for latents with captions instead."""
    captions: tuple[str, ...] = ()
    """Columns with captions."""
    text: StoredText | None = None
    """Description of the encoded captions; None if they are not stored."""
    latent_sizes: tuple[tuple[int, int], ...] = ()
    """With aspect-ratio buckets: the heights and widths of latents, one of them for each shard; () for squares."""
    patch_features: StoredFeatures | None = None
    """Description of the images' features; None if they are not stored."""
    num_samples: int
    """Number of records in all shards."""
    shards: tuple[dict[str, Any], ...]
    """For each shard, in order: `file` (relative to the folder), `num_samples`, `size` in bytes, `sha256`; with
    `latent_sizes` also its `latent_size`."""
    unreadable: tuple[str, ...] = ()
    """Names of the source's images that could not be read and are left out."""
    format_version: int = 1
    """Version of this format: 2 if there are captions, `latent_sizes` or `patch_features`."""

    def __post_init__(self):
        # Kind, dtype and sizes.
        if self.kind not in ("moments", "latents"):
            raise ValueError(f"Expected kind 'moments' or 'latents', got {self.kind!r}.")
        if self.dtype not in _COLUMN_DTYPES:
            raise ValueError(f"Expected dtype {' or '.join(map(repr, _COLUMN_DTYPES))}, got {self.dtype!r}.")
        for name in ("latent_channels", "latent_size", "resolution", "num_samples"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"Expected an integer {name} >= 1, got {getattr(self, name)!r}.")
        channels, height, width = self.shape
        if channels * height * width > MAX_VALUES:
            raise ValueError(f"Expected records of at most {MAX_VALUES} values, got {list(self.shape)}.")

        # Codec, classes and types.
        if len(self.codec.latents_mean or [0.0] * self.latent_channels) != self.latent_channels:
            raise ValueError(
                f"Expected latents_mean of the {self.latent_channels} latent_channels, got {self.latents_mean}."
            )
        if sorted(self.id2label) != list(range(len(self.id2label))) or not (self.id2label or self.captions):
            raise ValueError(f"Expected id2label with the classes 0, 1, ..., got {sorted(self.id2label)[:10]}.")
        for name, kind in (("vae", dict), ("source", dict), ("crop", str), ("has_flipped", bool)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"Expected {name} to be a {kind.__name__}, got {getattr(self, name)!r}.")
        for name, kinds in (("id2label", str), ("vae", (str, type(None)))):
            if wrong := [value for value in getattr(self, name).values() if not isinstance(value, kinds)]:
                raise ValueError(f"Expected text in {name}, got {wrong[0]!r}.")
        self._check_format_2()

    def _check_format_2(self) -> None:
        # Captions.
        is_format_2 = bool(self.captions or self.latent_sizes or self.patch_features)
        if (self.format_version == 2) != is_format_2 or (self.text and not self.captions):
            raise ValueError(
                f"Expected format_version 2 for captions, latent_sizes or patch_features, text with captions only, "
                f"got {self.format_version!r}, {self.captions!r}, {self.latent_sizes!r} and {self.patch_features!r}."
            )
        if wrong := [
            name for name in self.captions if not isinstance(name, str) or not name.isprintable() or not name
        ]:
            raise ValueError(f"Expected names of caption columns, got {wrong[0]!r}.")
        if len(set(columns := self.columns())) != len(columns):
            raise ValueError(f"Expected caption columns with names of their own, got {columns}. Rename them.")

        # Sizes and features.
        sizes = self.latent_sizes
        if any(len(size) != 2 or not all(map(is_count, size)) for size in sizes) or len(set(sizes)) != len(sizes):
            raise ValueError(f"Expected latent_sizes, each a height and a width >= 1, once each, got {sizes}.")
        if sizes and (max(map(max, sizes)) != self.latent_size or self.resolution % self.latent_size):
            raise ValueError(
                f"Expected the longest of the latent_sizes as latent_size, and a resolution that is a multiple of it, "
                f"got {sizes}, {self.latent_size} and {self.resolution}."
            )
        if self.patch_features is not None:
            self._check_features(self.patch_features)

    def _check_features(self, features: StoredFeatures) -> None:
        sizes = self.latent_sizes or (self.shape[1:],)
        if wrong := [size for size in sizes if any(side % features.patch_size for side in size)]:
            raise ValueError(
                f"Expected latents with sides that are multiples of the features' patch_size {features.patch_size}, "
                f"got {list(wrong[0])}. Take a --features_patch_size that divides them."
            )
        if any(features.num_bytes(*size) > MAX_VALUES for size in sizes):
            raise ValueError(f"Expected features of an image in at most {MAX_VALUES} bytes, got {features}.")

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
        """Shape [M, S, S] of one record."""
        channels = self.latent_channels * (2 if self.kind == "moments" else 1)
        return channels, self.latent_size, self.latent_size

    def record_shape(self, place: int = 0) -> tuple[int, int, int]:
        """Shape [M, H, W] of records of `latent_sizes[place]`; `shape` if there are no buckets."""
        return (self.shape[0], *self.latent_sizes[place]) if self.latent_sizes else self.shape

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths of the images in pixels: ((R, R),) without buckets."""
        factor = self.resolution // self.latent_size
        buckets = tuple((height * factor, width * factor) for height, width in self.latent_sizes)
        return buckets or ((self.resolution, self.resolution),)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "LatentsInfo":
        """Reads and checks `latents.json` of a folder, which may come from an untrusted source.

        Raises:
            ValueError: The file is missing or has another format; a shard is outside the folder or listed twice; the
                counts do not add up.
        """
        path = Path(folder, INFO)
        try:
            values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
            version = values.get("format_version")
            if version not in (1, 2) or not is_count(version):
                raise ValueError(f"format_version is {version!r}, not 1 or 2")
            labels = {int(label): name for label, name in values["id2label"].items()}
            if len(labels) != len(values["id2label"]):
                raise ValueError("id2label names a class twice")
            values["id2label"] = labels
            for name in ("shards", "unreadable", "latents_mean", "latents_std", "captions", "latent_sizes"):
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            if "latent_sizes" in values:
                values["latent_sizes"] = tuple(map(tuple, values["latent_sizes"]))
            if values.get("text") is not None:
                values["text"] = StoredText(**values["text"])
            if values.get("patch_features") is not None:
                values["patch_features"] = StoredFeatures(**values["patch_features"])
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
        values = dataclasses.asdict(self)
        if self.format_version == 1:
            for name in ("captions", "text", "latent_sizes"):
                del values[name]
        if self.patch_features is None:  # as in folders from before features existed
            del values["patch_features"]
        return values

    def columns(self) -> list[str]:
        """The names of a shard's columns."""
        columns = ["moments", *(["moments_flipped"] if self.has_flipped else [])]
        columns += [*(["height", "width"] if self.latent_sizes else []), *(["label"] if self.id2label else [])]
        columns += self.feature_columns()
        for caption in self.captions:
            columns += [caption, *(self.text.columns(caption).values() if self.text else [])]
        return columns

    def feature_columns(self) -> list[str]:
        """The columns with a vision encoder's features (`features` is something else: it describes all columns)."""
        return [] if self.patch_features is None else list(COLUMNS[: 1 + self.has_flipped])

    def features(self):
        """The columns of a shard as `datasets.Features`."""
        import datasets

        # Latents: lists of a fixed length for squares, of any length if shards have different sizes.
        length = -1 if self.latent_sizes else math.prod(self.shape)
        values = datasets.Sequence(datasets.Value(_COLUMN_DTYPES[self.dtype]), length=length)

        # Classes. Their names may occur twice (ImageNet has two cranes), but those of a ClassLabel must be unique.
        names = [self.id2label[label] for label in range(len(self.id2label))]
        names = names if len(set(names)) == len(names) else [f"{label} {name}" for label, name in enumerate(names)]

        # Types by column.
        kinds = {"moments": values, "moments_flipped": values}
        kinds |= {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
        kinds |= {"label": datasets.ClassLabel(names=names)} if names else {}
        kinds |= {column: datasets.Value("large_binary") for column in COLUMNS}
        for caption in self.captions:
            kinds[caption] = datasets.Value("string")
            for column in self.text.columns(caption).values() if self.text else ():
                kinds[column] = datasets.Value("large_binary")
        return datasets.Features({name: kinds[name] for name in self.columns()})


def _check_shards(info: LatentsInfo) -> None:
    """Raises ValueError for lists of shards and unreadable images that no writer makes."""
    # Each shard.
    if wrong := [name for name in info.unreadable if not isinstance(name, str)]:
        raise ValueError(f"expected names of unreadable images, got {wrong[0]!r}")
    fields, files = (
        {"file", "num_samples", "size", "sha256"} | ({"latent_size"} if info.latent_sizes else set()),
        set(),
    )
    for shard in info.shards:
        if not isinstance(shard, dict) or set(shard) != fields:
            raise ValueError(f"expected shards with {sorted(fields)}, got {shard!r}")
        file, digest = shard["file"], shard["sha256"]
        # Only plain names: `datasets` would follow paths out of the folder, patterns and URLs.
        if not isinstance(file, str) or not _SHARD_FILE.fullmatch(file):
            raise ValueError(f"expected shards in the folder, such as data/train-00000-of-00001.arrow, got {file!r}")
        if file in files:
            raise ValueError(f"the shard {file} is named twice")
        files.add(file)
        if info.latent_sizes and shard["latent_size"] not in [list(size) for size in info.latent_sizes]:
            raise ValueError(f"expected a latent_size of {file} among {info.latent_sizes}, got {shard!r}")
        if not is_count(shard["num_samples"]) or not is_count(shard["size"]):
            raise ValueError(f"expected num_samples and size >= 1 of {file}, got {shard!r}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"expected the SHA-256 of {file} in hexadecimal digits, got {digest!r}")

    # All shards together.
    if missing := {*info.latent_sizes} - {tuple(shard["latent_size"]) for shard in info.shards if info.latent_sizes}:
        raise ValueError(f"expected a shard of every latent_size, got none of {sorted(missing)}")
    if (total := sum(shard["num_samples"] for shard in info.shards)) != info.num_samples:
        raise ValueError(f"the shards have {total} records and num_samples is {info.num_samples}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a field stands twice among {[name for name, _ in pairs]}")
    return values
