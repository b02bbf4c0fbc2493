# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts webdataset shards of latents from other tools into a folder of latents for training.

    python examples/import_latents.py --tars 'shards/*.tar' --values latents --scaled --resolution 256 \
        --num_classes 1000 --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir imagenet-latents

The shards do not say what their values are, so the flags must. Run the same command to resume a killed run. The flags
are the fields of `ImportConfig`, see docs/latents.md.
"""

import dataclasses
import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers_tread.installation import require


require("train", "accelerate", "datasets", "psutil", "tyro")

from tqdm.auto import tqdm

from diffusers_tread.claims import claim
from diffusers_tread.data import LatentCodec, LatentsInfo, LatentsWriter
from diffusers_tread.data.latents.codec import latent_patch_size
from diffusers_tread.data.latents.importing import pack_record, read_webdataset, to_batches
from diffusers_tread.data.latents.vae import LoadedVAE, load_vae
from diffusers_tread.data.latents.writing import digest_files
from diffusers_tread.runs.latents import LatentsConfig, describe_latents, share_latents
from diffusers_tread.runs.parsing import parse_config, read_json
from diffusers_tread.runs.signals import stopped_cleanly


@dataclass(frozen=True, kw_only=True)
class ImportConfig(LatentsConfig):
    """Shards of latents, and what their values are.

    Raises:
        ValueError: A field is missing or out of its range, or fields contradict each other.
    """

    tars: str
    """The shards, as a path with wildcards."""
    latent_member: str = "latent.npy"
    """Extension of the arrays in a shard."""
    label_member: str = "cls"
    """Extension of the labels in a shard."""
    values: Literal["latents", "moments", "mean_logvar"]
    """What the arrays hold: latents, mean and standard deviation, or mean and log-variance."""
    scaled: bool = False
    """The values are already normalised for training."""
    id2label: str | None = None
    """Names of the classes, as a JSON file or text such as {"0": "ant", "1": "bee"}; None to use numbers."""

    def __post_init__(self):
        super().__post_init__()
        if (self.num_classes is None) == (self.id2label is None):
            raise ValueError("Expected either --num_classes or --id2label, got both or none.")
        if self.scaled and self.values == "mean_logvar":
            raise ValueError(
                "Expected --scaled with latents or moments, got mean_logvar, whose variances no scale fits."
            )


def describe(config: ImportConfig, first, vae: LoadedVAE) -> LatentsInfo:
    """Describes the folder to write, and checks that the first record fits the VAE."""
    # Classes.
    id2label = {label: str(label) for label in range(config.num_classes or 0)}
    if config.id2label is not None:
        names = read_json(config.id2label)
        id2label = {label: names.get(str(label)) for label in range(len(names))}
        if None in id2label.values():
            raise ValueError(f"Expected names for 0 to {len(names) - 1} in --id2label, got {sorted(names)}.")

    # Latents.
    known = {"kind": "latents" if config.values == "latents" else "moments", "crop": "unknown", "num_samples": 1}
    known |= {"id2label": id2label, "source": {"tars": config.tars}}
    identity, codec = vae.identity | {"dtype": "an unknown dtype"}, LatentCodec() if config.scaled else vae.codec
    info = describe_latents(config, dataclasses.replace(vae, identity=identity, codec=codec), **known)
    if pack_record(first, info, latent_patch_size(vae.model)).values.shape != info.shape:
        raise ValueError(
            f"Expected {config.values} {list(info.shape)}, as this VAE makes them at --resolution "
            f"{config.resolution}, got {list(first.values.shape)} for {first.name}. Check --values, --resolution and "
            "the VAE."
        )
    return info


def main(argv: list[str] | None = None) -> None:
    # Shards and VAE.
    config = parse_config(ImportConfig, argv, description=__doc__.split("\n")[0])
    tars = [Path(tar) for tar in sorted(glob.glob(config.tars))]
    members = {"latent_member": config.latent_member, "label_member": config.label_member}
    if len({tar.resolve() for tar in tars}) != len(tars):
        raise ValueError(f"Expected each shard once, got links to the same file among {config.tars}.")
    if not tars:
        raise ValueError(f"Expected shards with records at {config.tars}, got no file.")
    first = next(read_webdataset(tars[0], **members))
    place = {"subfolder": config.vae_subfolder, "revision": config.vae_revision}
    vae = load_vae(config.pretrained_vae_name_or_path, **place)
    info, patch_size = describe(config, first, vae), latent_patch_size(vae.model)

    # Convert the missing shards.
    writer = LatentsWriter(config.output_dir, info, num_shards=len(tars))
    with claim(config.output_dir), stopped_cleanly(argv, kept="finished shards"):
        settings = {"tars": [tar.name for tar in tars], "values": config.values, **members}
        missing = writer.open(settings, sources=[digest_files([tar]) for tar in tars])
        for shard in tqdm(missing, desc="Importing", unit="shard"):
            records = read_webdataset(tars[shard], **members)
            writer.write(shard, to_batches(records, values=config.values, info=info, patch_size=patch_size))
        info = writer.finish()
    print(f"{config.output_dir} holds {info.num_samples} records in {len(info.shards)} shards.")
    share_latents(config, info)


if __name__ == "__main__":
    main()
