# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Turns webdataset shards of latents that others made into a folder of latents to train from.

    python examples/import_latents.py --tars 'shards/*.tar' --values latents --scaled --resolution 256 \
        --num_classes 1000 --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir imagenet-latents

The shards do not say what their values are: the flags must. The same command goes on with a run that was killed. See
docs/latents.md.
"""

import argparse
import dataclasses
import glob
from functools import partial
from pathlib import Path

import torch
from precompute_latents import load_vae, share
from tqdm.auto import tqdm

from diffusers_tread.claims import claim
from diffusers_tread.data import LatentCodec, LatentsInfo, LatentsWriter, check_vae
from diffusers_tread.data.latents.codec import latent_patch_size
from diffusers_tread.data.latents.importing import VALUES, pack_record, read_webdataset, to_batches
from diffusers_tread.data.latents.writing import digest_files
from diffusers_tread.runs.signals import stopped_cleanly
from diffusers_tread.training.config import read_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--tars", required=True, help="The shards, a path with wildcards.")
    add("--latent_member", default="latent.npy", help="Extension of the arrays in a shard.")
    add("--label_member", default="cls", help="Extension of the labels in a shard.")
    add("--output_dir", required=True, help="The folder to write.")

    # What the values are.
    add("--values", choices=VALUES, required=True, help="Latents, mean and deviation, or mean and log-variance.")
    add("--scaled", action="store_true", help="They are already normalised for training.")
    add("--resolution", type=int, required=True, help="Side of the images in pixels.")
    add("--num_classes", type=int, help="Number of classes.")
    add("--id2label", help='Instead: their names, a JSON file or text such as {"0": "ant", "1": "bee"}.')
    add("--pretrained_vae_name_or_path", required=True, help="The VAE that made them.")
    add("--vae_subfolder", help="Its folder in the repository, such as vae.")
    add("--vae_revision", help="Its revision.")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="What is stored.")

    # Hub.
    flag = partial(add, action=argparse.BooleanOptionalAction)
    flag("--push_to_hub", default=False, help="Upload the finished folder.")
    add("--hub_dataset_id", help='Repository to push to, "organisation/name".')
    flag("--hub_private", help="Whether a new repository is private; by default as its owner has set.")

    args = parser.parse_args(argv)
    if (args.num_classes is None) == (args.id2label is None):
        raise ValueError("Expected either --num_classes or --id2label, got both or none.")
    if args.scaled and args.values == "mean_logvar":
        raise ValueError("Expected --scaled with latents or moments, got mean_logvar, whose variances no scale fits.")
    if args.push_to_hub and "/" not in (args.hub_dataset_id or ""):
        raise ValueError(
            f'Expected --hub_dataset_id "organisation/name" with --push_to_hub, got {args.hub_dataset_id!r}.'
        )
    args.vae_dtype = "float32"
    return args


def describe(args: argparse.Namespace, first, vae, identity, codec: LatentCodec) -> LatentsInfo:
    """What the folder will hold; checks the first record against the VAE."""
    _, channels, size = check_vae(vae, args.resolution)
    id2label = {label: str(label) for label in range(args.num_classes or 0)}
    if args.id2label is not None:
        names = read_json(args.id2label)
        id2label = {label: names.get(str(label)) for label in range(len(names))}
        if None in id2label.values():
            raise ValueError(f"Expected names for 0 to {len(names) - 1} in --id2label, got {sorted(names)}.")
    info = LatentsInfo(
        kind="latents" if args.values == "latents" else "moments",
        dtype=args.dtype,
        latent_channels=channels,
        latent_size=size,
        resolution=args.resolution,
        **dataclasses.asdict(codec),
        vae=identity | {"dtype": "an unknown dtype"},
        source={"tars": args.tars},
        crop="unknown",
        id2label=id2label,
        num_samples=1,
        shards=(),
    )
    if pack_record(first, info, latent_patch_size(vae)).values.shape != info.shape:
        raise ValueError(
            f"Expected {args.values} {list(info.shape)}, as this VAE makes them at --resolution {args.resolution}, "
            f"got {list(first.values.shape)} for {first.name}. Check --values, --resolution and the VAE."
        )
    return info


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tars = [Path(tar) for tar in sorted(glob.glob(args.tars))]
    members = {"latent_member": args.latent_member, "label_member": args.label_member}
    if len({tar.resolve() for tar in tars}) != len(tars):
        raise ValueError(f"Expected each shard once, got links to the same file among {args.tars}.")
    if not tars:
        raise ValueError(f"Expected shards with records at {args.tars}, got no file.")
    first = next(read_webdataset(tars[0], **members))
    vae, identity, codec = load_vae(args, torch.device("cpu"))
    info = describe(args, first, vae, identity, LatentCodec() if args.scaled else codec)

    writer = LatentsWriter(args.output_dir, info, num_shards=len(tars))
    with claim(args.output_dir), stopped_cleanly(argv, kept="finished shards"):
        settings = {"tars": [tar.name for tar in tars], "values": args.values, **members}
        missing = writer.open(settings, sources=[digest_files([tar]) for tar in tars])
        for shard in tqdm(missing, desc="Importing", unit="shard"):
            records = read_webdataset(tars[shard], **members)
            packed = to_batches(records, values=args.values, info=info, patch_size=latent_patch_size(vae))
            writer.write(shard, packed)
        info = writer.finish()
    print(f"{args.output_dir} holds {info.num_samples} records in {len(info.shards)} shards.")
    share(args, info)


if __name__ == "__main__":
    main()
