# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Shared parts of the scripts that make folders of latents: flags, description, card, upload."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ..data import Buckets, CaptionColumns, LatentsInfo, LatentsWriter, check_vae
from ..data.latents.card import latents_card
from ..data.latents.codec import spatial_compression
from ..data.latents.features import StoredFeatures
from ..data.latents.text import describe_empty
from ..data.latents.vae import LoadedVAE
from ..files import find_pipeline, whole
from ..hub import upload_folder
from ..hub_errors import ADVICE, LOST
from ..objectives.terms.vision_encoder import VisionEncoder
from ..text import PromptEncoder
from .parsing import check_at_least


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """Settings of a folder of latents, whatever their source.

    Raises:
        ValueError: A field is missing or out of its range.
    """

    output_dir: str = "latents"
    """The folder to write, shared by all processes."""
    resolution: int | None = None
    """Side of the images in pixels; required."""
    num_classes: int | None = None
    """Number of classes; None for the number in the data."""
    pretrained_vae_name_or_path: str | None = None
    """The VAE of the latents, any image VAE of diffusers; required."""
    vae_subfolder: str | None = None
    """Folder of the VAE in its repository, such as vae."""
    vae_revision: str | None = None
    """Branch, tag or commit of the VAE's repository."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision in which latents are stored."""
    push_to_hub: bool = False
    """Upload the finished folder to the Hub."""
    hub_dataset_id: str | None = None
    """Repository to push to, "organisation/name"."""
    hub_private: bool | None = None
    """Whether a new repository is private; None for its owner's default."""

    def needed(self) -> tuple[str, ...]:
        """The fields that must be given."""
        return "resolution", "pretrained_vae_name_or_path"

    def __post_init__(self):
        for name in self.needed():
            if getattr(self, name) is None:
                raise ValueError(f"Expected --{name}, got none.")
        check_at_least(self, 1, "resolution", "num_classes")
        if self.push_to_hub and "/" not in (self.hub_dataset_id or ""):
            raise ValueError(
                f'Expected --hub_dataset_id "organisation/name" with --push_to_hub, got {self.hub_dataset_id!r}.'
            )


def describe_latents(
    config: LatentsConfig, vae: LoadedVAE, *, buckets: Buckets | None = None, **known: Any
) -> LatentsInfo:
    """Describes the content of a folder before it is written, by encoding an empty image of each size.

    Args:
        config: The folder's settings.
        vae: The VAE that makes, or made, the latents.
        buckets: Sizes of the images; None for squares.
        **known: Further fields of `LatentsInfo`; they override what is found with the VAE.
    """
    sizes: Any = [(config.resolution, config.resolution)] if buckets is None else buckets.sizes
    for pixels in sizes:
        kind, channels, _ = check_vae(vae.model, pixels)
    factor, resolution = spatial_compression(vae.model), max(side for size in sizes for side in size)
    fields = {"kind": kind, "dtype": config.dtype, "latent_channels": channels, "latent_size": resolution // factor}
    fields |= {"resolution": resolution, "vae": vae.identity, "shards": (), **dataclasses.asdict(vae.codec)}
    if buckets is not None:
        fields["latent_sizes"] = tuple((height // factor, width // factor) for height, width in sizes)
    is_format_2 = buckets is not None or known.get("captions") or known.get("patch_features")
    fields["format_version"] = 2 if is_format_2 else 1
    return LatentsInfo(**(fields | known))


def load_prompt_encoder(
    name: str,
    *,
    dtype: str = "float32",
    max_sequence_length: int | None = None,
    call_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> PromptEncoder:
    """Loads the tokenizers and text encoders of a text-to-image pipeline.

    Args:
        name: A folder or a Hub repository with a diffusers pipeline. Its transformer and VAE are not loaded.
        dtype: Precision of the text encoders.
        max_sequence_length: See `PromptEncoder`.
        call_options: See `PromptEncoder`.
        device: Device of the text encoders.

    Raises:
        ValueError: There is no pipeline with safetensors weights; as for `PromptEncoder`.
    """
    parts = {"transformer": None, "vae": None, "torch_dtype": getattr(torch, dtype), "use_safetensors": True}
    try:
        pipeline = DiffusionPipeline.from_pretrained(find_pipeline(name), **parts)
    except (ValueError, *LOST) as error:
        raise ValueError(f"Expected a diffusers text-to-image pipeline at {name!r}, got: {error} {ADVICE}") from error
    return PromptEncoder(pipeline.to(device), max_sequence_length=max_sequence_length, call_options=call_options)


class CaptionStore:
    """The captions of a data set and, optionally, their encoding by text encoders.

    Args:
        source: A data set from `open_images`.
        columns: The caption columns; all of them are stored.
        encoder: Encodes the captions; None to store only the captions.

    Raises:
        ValueError: A column does not hold text.
    """

    def __init__(self, source, columns: CaptionColumns, encoder: PromptEncoder | None = None):
        self.source, self.names = source.select_columns(columns.columns(source.features)), columns.names
        for name in self.names:
            if getattr(kind := source.features.get(name), "dtype", None) not in ("string", "large_string"):
                raise ValueError(
                    f"Expected one text per image in the caption column {name!r}, got {kind}. Make it a column of "
                    "text, and of a list one column for each of its captions."
                )
        self.encoder, self.info, self.empty = encoder, None, None
        if encoder is not None:
            self.info, self.empty = describe_empty(encoder.identity(), encoder.encode([""])[0])

    def encode(self, captions: list[str]) -> list[dict[str, torch.Tensor]]:
        """Encodes captions, one dict of tensors per caption."""
        return self.encoder.encode(captions)

    def digest(self) -> str:
        """A hash of all captions."""
        digest = hashlib.sha256()
        for records in self.source.iter(batch_size=1000):
            digest.update(json.dumps(records, sort_keys=True).encode())
        return digest.hexdigest()

    def count_too_long(self) -> int:
        """Number of captions that are too long for the encoder and get cut off."""
        batches = self.source.iter(batch_size=1000)
        return sum(self.encoder.count_too_long(records[name]) for records in batches for name in self.names)

    def bytes_per_image(self) -> float:
        """Bytes that the encoded captions of an image take, estimated from the first 8 images."""
        first = [text for name in self.names for text in self.source[:8][name]]
        arrays = [values for sample in self.encode(first) for values in sample.values()]
        return sum(values.nbytes for values in arrays) / len(first) * len(self.names)


class FeatureStore:
    """The features of a vision encoder, for a folder of latents.

    Args:
        name: Name or path for `VisionEncoder.from_pretrained`.
        dtype: Precision in which features are stored.
        patch_size: Patch size P of the denoiser that is to be aligned.

    Raises:
        ValueError: There is no such encoder.
    """

    def __init__(self, name: str, *, dtype: str, patch_size: int):
        self.encoder = encoder = VisionEncoder.from_pretrained(name)
        self.info = StoredFeatures(
            encoder=encoder.identity(),
            name_or_path=name,
            revision=encoder.revision,
            encoder_dtype=str(encoder.dtype).removeprefix("torch."),
            dtype=dtype,
            width=encoder.width,
            patch_size=patch_size,
        )

    def encode(self, images: torch.Tensor, latent_size: Sequence[int]) -> torch.Tensor:
        """Encodes images to features of shape [B, N, E] in the stored dtype, one for each P x P patch of the latents.

        Args:
            images: Shape [B, 3, height, width], in [-1, 1].
            latent_size: Height and width of their latents.
        """
        height, width = (side // self.info.patch_size for side in latent_size)
        return self.encoder(images, (height, width)).to(self.info.torch_dtype)


def told_sizes(writer: LatentsWriter, plan: Sequence[Sequence[int]], text: CaptionStore | None) -> str:
    """A message to print before the work starts: the size of the folder, and the number of captions that are too long.

    Args:
        writer: The folder's writer.
        plan: The images of each shard.
        text: Their captions; None if there are none.
    """
    # Latents and features.
    info, shards = writer.info, list(zip(plan, writer.size_places, strict=True))
    num_images = sum(len(rows) for rows in plan)
    values = sum(len(rows) * math.prod(info.record_shape(place)) for rows, place in shards)
    latents, features = values * info.torch_dtype.itemsize * (1 + info.has_flipped) / 2**30, ""
    if info.patch_features is not None:
        sizes = [(len(rows), *info.record_shape(place)[1:]) for rows, place in shards]
        total = sum(rows * info.patch_features.num_bytes(*size) for rows, *size in sizes) * (1 + info.has_flipped)
        features = f" The vision encoder's features take {total / 2**30:.3g} GiB, {total / num_images / 1024:.4g} KiB "
        features += "per image."

    # Text.
    if text is None or text.encoder is None:
        return f"Latents take {latents:.3g} GiB.{features}"
    size, cut, num_captions = text.bytes_per_image() * num_images, text.count_too_long(), num_images * len(text.names)
    return (
        f"Text takes about {size / 2**30:.3g} GiB, latents {latents:.3g} GiB. {cut} of {num_captions} captions are "
        f"longer than the text encoder reads and lose their end.{features}"
    )


def share_latents(config: LatentsConfig, info: LatentsInfo) -> None:
    """Writes the card of a finished folder, unless it has one, and uploads the folder if the config asks for it."""
    folder = Path(config.output_dir)
    card = folder / "README.md"
    if not card.exists():
        with whole(card) as temporary:
            latents_card(info, repo_id=config.hub_dataset_id or folder.resolve().name).save(temporary)
    if config.push_to_hub:
        url = upload_folder(folder, repo_id=config.hub_dataset_id, repo_type="dataset", private=config.hub_private)
        print(f"Pushed to {url}.")
