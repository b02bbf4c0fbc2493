# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the scripts that make folders of latents have in common: flags, description, card, upload."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data import LatentsInfo, check_vae
from ..data.latents.card import latents_card
from ..data.latents.vae import LoadedVAE
from ..files import whole
from ..hub import upload_folder
from .parsing import check_at_least


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """A folder of latents, wherever they come from.

    Raises:
        ValueError: A field is missing or out of its range.
    """

    output_dir: str = "latents"
    """The folder to write, seen by all processes."""
    resolution: int | None = None
    """Side of the images in pixels; needed."""
    num_classes: int | None = None
    """Number of classes; None for as many as the data have."""
    pretrained_vae_name_or_path: str | None = None
    """Any diffusers image VAE; needed."""
    vae_subfolder: str | None = None
    """Its folder in the repository, such as vae."""
    vae_revision: str | None = None
    """Branch, tag or commit of its repository."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """What is stored."""
    push_to_hub: bool = False
    """Upload the finished folder."""
    hub_dataset_id: str | None = None
    """Repository to push to, "organisation/name"."""
    hub_private: bool | None = None
    """Whether a new repository is private; None for what its owner has set."""

    def __post_init__(self):
        for name in ("resolution", "pretrained_vae_name_or_path"):
            if getattr(self, name) is None:
                raise ValueError(f"Expected --{name}, got none.")
        check_at_least(self, 1, "resolution", "num_classes")
        if self.push_to_hub and "/" not in (self.hub_dataset_id or ""):
            raise ValueError(
                f'Expected --hub_dataset_id "organisation/name" with --push_to_hub, got {self.hub_dataset_id!r}.'
            )


def describe_latents(config: LatentsConfig, vae: LoadedVAE, **known: Any) -> LatentsInfo:
    """What a folder will hold, found out by encoding an empty image.

    Args:
        config: Of the folder.
        vae: That makes or made the latents.
        **known: Further fields of `LatentsInfo`, and those that the VAE does not tell right.
    """
    kind, channels, size = check_vae(vae.model, config.resolution)
    fields = {"kind": kind, "dtype": config.dtype, "latent_channels": channels, "latent_size": size, "shards": ()}
    fields |= {"resolution": config.resolution, "vae": vae.identity, **dataclasses.asdict(vae.codec)}
    return LatentsInfo(**(fields | known))


def share_latents(config: LatentsConfig, info: LatentsInfo) -> None:
    """Writes the card of a finished folder, unless there is one, and uploads the folder if asked to."""
    folder = Path(config.output_dir)
    card = folder / "README.md"
    if not card.exists():
        with whole(card) as temporary:
            latents_card(info, repo_id=config.hub_dataset_id or folder.resolve().name).save(temporary)
    if config.push_to_hub:
        url = upload_folder(folder, repo_id=config.hub_dataset_id, repo_type="dataset", private=config.hub_private)
        print(f"Pushed to {url}.")
