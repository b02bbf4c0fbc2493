# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Encodes a data set of images into a folder of latents to train from, which is a Hub data set as it lies there.

    python examples/precompute_latents.py --train_data_dir photos --resolution 256 \
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir photos-latents
    accelerate launch examples/precompute_latents.py --config examples/configs/imagenet256_latents.json
    python examples/precompute_latents.py --verify photos-latents

The same command goes on with a run that was killed. See docs/latents.md.
"""

import argparse
import dataclasses
import hashlib
import math
import re
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from accelerate.state import PartialState
from datasets.exceptions import DatasetNotFoundError
from diffusers import AutoModel
from huggingface_hub.errors import HfHubHTTPError

from diffusers_tread.claims import claim
from diffusers_tread.data import (
    LatentCodec,
    LatentsInfo,
    LatentsWriter,
    check_vae,
    latent_codec,
    open_images,
    verify_latents,
)
from diffusers_tread.data.latents.card import latents_card
from diffusers_tread.data.latents.encoding import digest_sources, encode_shards
from diffusers_tread.distributed import on_main_process
from diffusers_tread.files import whole
from diffusers_tread.fingerprint import weights_fingerprint
from diffusers_tread.hub import open_repo, upload_folder
from diffusers_tread.runs.signals import stopped_cleanly
from diffusers_tread.training.config import config_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, over the values of `--config`, over the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    flag = partial(add, action=argparse.BooleanOptionalAction)

    add("--config", help="JSON file with values for any of these flags; the command line wins.")
    add("--output_dir", default="latents", help="The folder to write, seen by all processes.")
    add("--verify", metavar="DIR", help="Only compare every shard of a finished folder with its SHA-256.")

    # Images.
    add("--dataset_name", help="A `datasets` repository, such as ILSVRC/imagenet-1k.")
    add("--dataset_config_name", help="Its configuration.")
    add(
        "--dataset_split",
        help="The split to encode, of --train_data_dir the sub-folder; by default train, or the folder itself.",
    )
    add("--train_data_dir", help="Instead: a folder with one folder of images per class.")
    add("--background", default="white", help="Colour behind transparent images, such as white or #808080.")
    add("--image_column", default="image", help="Column with images.")
    add("--label_column", default="label", help="Column with class labels.")
    add("--num_classes", type=int, help="Number of classes; by default as many as the data have.")
    add("--cache_dir", help="Cache of `datasets`.")
    add("--resolution", type=int, help="Side of the images in pixels.")
    flag("--flip", default=False, help="Encode the mirrored images too.")
    add("--max_corrupt_images", type=int, default=100, help="Unreadable images to leave out, then an error.")

    # VAE.
    add("--pretrained_vae_name_or_path", help="Any diffusers image VAE.")
    add("--vae_subfolder", help="Its folder in the repository, such as vae.")
    add("--vae_revision", help="Its revision.")
    dtypes = ("float16", "bfloat16", "float32")
    add("--vae_dtype", choices=dtypes, default="float32", help="What the VAE computes in.")

    # Output and speed.
    add("--dtype", choices=dtypes, default="float16", help="What is stored.")
    add("--shard_size", type=int, default=10_000, help="Images per shard.")
    add("--batch_size", type=int, default=32, help="Images per process and forward.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that decode images, per process.")

    # Hub.
    flag("--push_to_hub", default=False, help="Upload the finished folder.")
    add("--hub_dataset_id", help='Repository to push to, "organisation/name".')
    flag("--hub_private", help="Whether a new repository is private; by default as its owner has set.")

    # The config becomes flags in front of the command line: both are read by the same rules.
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    flags = [] if args.config is None else config_flags(args.config, known=set(vars(args)) - {"config"})
    return check_args(parser.parse_args(flags + argv))


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    if args.verify is not None:
        return args
    for name in ("resolution", "pretrained_vae_name_or_path"):
        if getattr(args, name) is None:
            raise ValueError(f"Expected --{name}, got none.")
    for name in ("resolution", "num_classes", "shard_size", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"Expected --{name} > 0, got {value}.")
    for name in ("max_corrupt_images", "dataloader_num_workers"):
        if (value := getattr(args, name)) < 0:
            raise ValueError(f"Expected --{name} >= 0, got {value}.")
    if args.push_to_hub and "/" not in (args.hub_dataset_id or ""):
        raise ValueError(
            f'Expected --hub_dataset_id "organisation/name" with --push_to_hub, got {args.hub_dataset_id!r}.'
        )
    return args


def open_source(args: argparse.Namespace, state: PartialState):
    """The images, undecoded, and the names of their classes."""
    try:
        with state.main_process_first():  # one process fills the cache of `datasets`
            return open_images(
                args.dataset_name,
                train_data_dir=args.train_data_dir,
                dataset_config_name=args.dataset_config_name,
                split=args.dataset_split,
                image_column=args.image_column,
                label_column=args.label_column,
                num_classes=args.num_classes,
                cache_dir=args.cache_dir,
            )
    except (DatasetNotFoundError, ConnectionError, HfHubHTTPError) as error:
        raise ValueError(
            f"Expected access to the data set {args.dataset_name}, got: {str(error).rstrip('.')}. If it is gated, as "
            "ILSVRC/imagenet-1k is, accept its terms at https://huggingface.co/datasets/"
            f"{args.dataset_name} and log in with `hf auth login` or HF_TOKEN. Without a connection only data "
            "downloaded before can be read. The same command goes on."
        ) from error


def load_vae(args: argparse.Namespace, device: torch.device):
    """The VAE, what `LatentsInfo` says of it, and how latents are normalised."""
    name, place = args.pretrained_vae_name_or_path, {"subfolder": args.vae_subfolder, "revision": args.vae_revision}
    place = {key: value for key, value in place.items() if value is not None}
    try:
        vae = AutoModel.from_pretrained(name, **place, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a diffusers VAE with safetensors weights at {name}, got: {error}") from error
    if not hasattr(vae, "encode"):
        raise ValueError(f"Expected a VAE at {name}, got {type(vae).__name__}. Name its --vae_subfolder.")

    # The commit, of a repository: its files are in the cache, in a folder with that name.
    config = "/".join(filter(None, (args.vae_subfolder, "config.json")))
    cached = None
    if not Path(name).exists():
        cached = huggingface_hub.try_to_load_from_cache(name, config, revision=args.vae_revision)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", cached if isinstance(cached, str) else "")
    identity = {
        "name_or_path": name,
        "subfolder": args.vae_subfolder,
        "revision": commit[1] if commit else args.vae_revision,
        "class_name": type(vae).__name__,
        "fingerprint": weights_fingerprint(vae),
        "dtype": args.vae_dtype,
    }
    codec = latent_codec(vae)  # before the cast, which would round statistics that are weights
    vae = vae.to(device).requires_grad_(False).eval()
    return vae if args.vae_dtype == "float32" else vae.to(getattr(torch, args.vae_dtype)), identity, codec


def describe(
    args: argparse.Namespace, source, id2label: dict[int, str], vae, identity: dict[str, Any], codec: LatentCodec
) -> LatentsInfo:
    """What the folder will hold, found out by encoding an empty image."""
    kind, channels, size = check_vae(vae, args.resolution)
    return LatentsInfo(
        kind=kind,
        dtype=args.dtype,
        latent_channels=channels,
        latent_size=size,
        resolution=args.resolution,
        **dataclasses.asdict(codec),
        vae=identity,
        source=describe_source(args, source),
        has_flipped=args.flip,
        id2label=id2label,
        num_samples=len(source),
        shards=(),
    )


def describe_source(args: argparse.Namespace, source) -> dict[str, Any]:
    common = {"split": args.dataset_split or "train", "columns": [args.image_column, args.label_column]}
    if args.train_data_dir is not None:
        return {"train_data_dir": Path(args.train_data_dir).resolve().name} | common
    # `datasets` names the folder in its cache after the commit.
    files = [file["filename"] for file in source.cache_files]
    commit = re.search(r"/([0-9a-f]{40})/", files[0]) if files else None
    return {
        "dataset_name": args.dataset_name,
        "config": args.dataset_config_name,
        "revision": commit[1] if commit else None,
    } | common


def share(args: argparse.Namespace, info: LatentsInfo) -> None:
    """Writes the card, unless there is one, and uploads the folder if asked to."""
    folder = Path(args.output_dir)
    card = folder / "README.md"
    if not card.exists():
        with whole(card) as temporary:
            latents_card(info, repo_id=args.hub_dataset_id or folder.resolve().name).save(temporary)
    if args.push_to_hub:
        url = upload_folder(folder, repo_id=args.hub_dataset_id, repo_type="dataset", private=args.hub_private)
        print(f"Pushed to {url}.")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.verify is not None:
        info = verify_latents(args.verify)
        print(f"{args.verify}: {len(info.shards)} shards with {info.num_samples} records are as they were written.")
        return

    # Processes wait hours for the one that downloads the images, and for the slowest at the end.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    torch.backends.cudnn.allow_tf32 = False  # by default NVIDIA's convolutions round float32; --vae_dtype is for that
    if args.push_to_hub:  # a token that may not write shows now
        on_main_process(lambda: open_repo(args.hub_dataset_id, repo_type="dataset", private=args.hub_private))
    source, id2label = open_source(args, state)
    vae, identity, codec = load_vae(args, state.device)
    info = describe(args, source, id2label, vae, identity, codec)
    writer = LatentsWriter(
        args.output_dir,
        info,
        num_shards=math.ceil(len(source) / args.shard_size),
        max_unreadable=args.max_corrupt_images,
    )
    labels = source.select_columns(args.label_column).with_format("numpy")[:][args.label_column]
    settings = {
        "num_images": len(source),
        "labels_sha256": hashlib.sha256(np.asarray(labels, dtype="<i8")).hexdigest(),
        "shard_size": args.shard_size,
        "batch_size": args.batch_size,
        "background": args.background,
    }

    def open_folder() -> list[int]:
        # A commit of a repository says all of its images.
        known = info.source.get("revision") is not None
        columns = {"image_column": args.image_column, "shard_size": args.shard_size}
        return writer.open(settings, sources=None if known else digest_sources(source, **columns))

    with claim(args.output_dir), stopped_cleanly(argv, kept="finished shards"):
        missing = on_main_process(open_folder)

        # Each process takes its part of what is missing.
        begin = time.perf_counter()
        encode_shards(
            writer,
            missing[state.process_index :: state.num_processes],
            source,
            vae,
            image_column=args.image_column,
            label_column=args.label_column,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            background=args.background,
            num_workers=args.dataloader_num_workers,
            progress=f"Encoding, process 1 of {state.num_processes}" if state.is_main_process else None,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            seconds = time.perf_counter() - begin
            info = writer.finish()
            print(
                f"{args.output_dir} holds {info.num_samples} records in {len(info.shards)} shards, {len(missing)} of "
                f"them written now in {seconds:.0f} s, and leaves out {len(info.unreadable)} unreadable images."
            )
    if state.is_main_process:  # without the lock, which is no part of what is shared
        share(args, info)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
