# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Encodes a data set of images into a folder of latents to train from, which is a Hub data set as it lies there.

    python examples/precompute_latents.py --data folder:photos --resolution 256 \
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir photos-latents
    accelerate launch examples/precompute_latents.py --recipe imagenet256
    python examples/precompute_latents.py --verify photos-latents

The same command goes on with a run that was killed. The flags are the fields of `PrecomputeConfig`; docs/latents.md.
"""

import hashlib
import math
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.state import PartialState
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from diffusers_tread.claims import claim
from diffusers_tread.data import LatentsWriter, open_images, verify_latents
from diffusers_tread.data.latents.encoding import digest_sources, encode_shards
from diffusers_tread.data.latents.vae import load_vae
from diffusers_tread.distributed import on_main_process
from diffusers_tread.hub import open_repo
from diffusers_tread.runs.latents import LatentsConfig, describe_latents, share_latents
from diffusers_tread.runs.parsing import check_at_least, parse_config
from diffusers_tread.runs.signals import stopped_cleanly


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(LatentsConfig):
    """Images, and how a VAE encodes them.

    Raises:
        ValueError: A field is missing or out of its range.
    """

    verify: str | None = None
    """Only compare every shard of this finished folder with its SHA-256."""
    data: str = ""
    """folder:PATH, with one folder of images per class, or hub:NAME, a `datasets` repository; needed."""
    dataset_config_name: str | None = None
    """Configuration of a data set on the Hub; None for its only one."""
    dataset_split: str | None = None
    """Split to encode, of a folder the sub-folder; None for train, or the folder itself."""
    image_column: str = "image"
    """Column with images."""
    label_column: str = "label"
    """Column with class labels."""
    cache_dir: str | None = None
    """Where downloaded data are kept; None for the cache of `datasets`."""
    background: str = "white"
    """Colour behind transparent images, such as white or #808080."""
    flip: bool = False
    """Encode the mirrored images too."""
    max_corrupt_images: int = 100
    """Unreadable images to leave out, then an error."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the VAE computes in."""
    shard_size: int = 10_000
    """Images per shard."""
    batch_size: int = 32
    """Images per process and forward."""
    dataloader_num_workers: int = 0
    """Processes that decode images, per process."""

    def __post_init__(self):
        if self.verify is not None:
            return
        super().__post_init__()
        if self.data.partition(":")[0] not in ("folder", "hub") or not self.data.partition(":")[2]:
            raise ValueError(f"Expected --data folder:PATH or hub:NAME, got {self.data!r}.")
        check_at_least(self, 1, "shard_size", "batch_size")
        check_at_least(self, 0, "max_corrupt_images", "dataloader_num_workers")


IMAGENET = {"data": "hub:ILSVRC/imagenet-1k", "pretrained_vae_name_or_path": "stabilityai/sd-vae-ft-ema"}
IMAGENET |= {"flip": True, "dataloader_num_workers": 8}
RECIPES = {
    "imagenet256": IMAGENET | {"resolution": 256, "batch_size": 64, "output_dir": "imagenet256-latents"},
    "imagenet512": IMAGENET | {"resolution": 512, "batch_size": 16, "output_dir": "imagenet512-latents"},
}


def recipe_settings(name: str) -> dict[str, Any]:
    """What train_tread.py's recipes for ImageNet train on."""
    if name not in RECIPES:
        raise ValueError(f"Expected a recipe among {list(RECIPES)}, got {name!r}.")
    return RECIPES[name]


def open_source(config: PrecomputeConfig, state: PartialState):
    """The images, undecoded, and the names of their classes."""
    kind, _, name = config.data.partition(":")
    try:
        with state.main_process_first():  # one process fills the cache of `datasets`
            return open_images(
                name if kind == "hub" else None,
                train_data_dir=name if kind == "folder" else None,
                dataset_config_name=config.dataset_config_name,
                split=config.dataset_split,
                image_column=config.image_column,
                label_column=config.label_column,
                num_classes=config.num_classes,
                cache_dir=config.cache_dir,
            )
    except (DatasetNotFoundError, ConnectionError, HfHubHTTPError) as error:
        raise ValueError(
            f"Expected access to the data set {name}, got: {str(error).rstrip('.')}. If it is gated, as "
            "ILSVRC/imagenet-1k is, accept its terms at https://huggingface.co/datasets/"
            f"{name} and log in with `hf auth login` or HF_TOKEN. Without a connection only data "
            "downloaded before can be read. The same command goes on."
        ) from error


def describe_source(config: PrecomputeConfig, source) -> dict[str, Any]:
    """Where the images are from, but for what says nothing to others."""
    kind, _, name = config.data.partition(":")
    common = {"split": config.dataset_split or "train", "columns": [config.image_column, config.label_column]}
    if kind == "folder":
        return {"train_data_dir": Path(name).resolve().name} | common
    # `datasets` names the folder in its cache after the commit.
    files = [file["filename"] for file in source.cache_files]
    commit = re.search(r"/([0-9a-f]{40})/", files[0]) if files else None
    revision = commit[1] if commit else None
    return {"dataset_name": name, "config": config.dataset_config_name, "revision": revision} | common


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PrecomputeConfig, argv, description=__doc__.split("\n")[0], recipe_settings=recipe_settings)
    if config.verify is not None:
        info = verify_latents(config.verify)
        print(f"{config.verify}: {len(info.shards)} shards with {info.num_samples} records are as they were written.")
        return

    # Everything is loaded and tried before the long work starts. Processes wait hours for the one that downloads the
    # images, and for the slowest at the end.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    torch.backends.cudnn.allow_tf32 = False  # by default NVIDIA's convolutions round float32; --vae_dtype is for that
    if config.push_to_hub:  # a token that may not write shows now
        on_main_process(lambda: open_repo(config.hub_dataset_id, repo_type="dataset", private=config.hub_private))
    source, id2label = open_source(config, state)
    place = {"subfolder": config.vae_subfolder, "revision": config.vae_revision}
    vae = load_vae(config.pretrained_vae_name_or_path, **place, dtype=config.vae_dtype, device=state.device)

    # What the folder will hold, and what it depends on.
    origin = describe_source(config, source)
    known = {"source": origin, "id2label": id2label, "num_samples": len(source), "has_flipped": config.flip}
    info = describe_latents(config, vae, **known)
    num_shards = math.ceil(len(source) / config.shard_size)
    writer = LatentsWriter(config.output_dir, info, num_shards=num_shards, max_unreadable=config.max_corrupt_images)
    labels = source.select_columns(config.label_column).with_format("numpy")[:][config.label_column]
    settings = {
        "num_images": len(source),
        "labels_sha256": hashlib.sha256(np.asarray(labels, dtype="<i8")).hexdigest(),
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "background": config.background,
    }

    def open_folder() -> list[int]:
        # A commit of a repository says all of its images.
        known = origin.get("revision") is not None
        columns = {"image_column": config.image_column, "shard_size": config.shard_size}
        return writer.open(settings, sources=None if known else digest_sources(source, **columns))

    with claim(config.output_dir), stopped_cleanly(argv, kept="finished shards"):
        missing = on_main_process(open_folder)

        # Each process takes its part of what is missing.
        begin = time.perf_counter()
        encode_shards(
            writer,
            missing[state.process_index :: state.num_processes],
            source,
            vae.model,
            image_column=config.image_column,
            label_column=config.label_column,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            background=config.background,
            num_workers=config.dataloader_num_workers,
            progress=f"Encoding, process 1 of {state.num_processes}" if state.is_main_process else None,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            seconds = time.perf_counter() - begin
            info = writer.finish()
            print(
                f"{config.output_dir} holds {info.num_samples} records in {len(info.shards)} shards, {len(missing)} "
                f"of them written now in {seconds:.0f} s, and leaves out {len(info.unreadable)} unreadable images."
            )
    if state.is_main_process:  # without the lock, which is no part of what is shared
        share_latents(config, info)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
