# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Encodes a data set of images into a folder of latents for training, which can be uploaded to the Hub unchanged.

    python examples/precompute_latents.py --data folder:photos --resolution 256 \
        --pretrained_vae_name_or_path stabilityai/sd-vae-ft-ema --output_dir photos-latents
    accelerate launch examples/precompute_latents.py --recipe imagenet256
    python examples/precompute_latents.py --verify photos-latents

Run the same command to resume a killed run. The flags are the fields of `PrecomputeConfig`, see docs/latents.md.
"""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from diffusers_tread.installation import require


require("train", "accelerate", "datasets", "psutil", "tyro")

import numpy as np
import torch
from accelerate.state import PartialState

from diffusers_tread.claims import claim
from diffusers_tread.data import (
    Buckets,
    CaptionColumns,
    LatentsWriter,
    assign_buckets,
    open_images,
    parse_caption_columns,
    verify_latents,
)
from diffusers_tread.data.latents.encoding import digest_sources, encode_shards, plan_shards
from diffusers_tread.data.latents.vae import LoadedVAE, load_vae
from diffusers_tread.distributed import on_main_process
from diffusers_tread.hub import open_repo
from diffusers_tread.runs.latents import (
    CaptionStore,
    FeatureStore,
    LatentsConfig,
    describe_latents,
    load_prompt_encoder,
    share_latents,
    told_sizes,
)
from diffusers_tread.runs.parsing import check_at_least, parse_config, read_json
from diffusers_tread.runs.signals import stopped_cleanly


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(LatentsConfig):
    """Images, and how a VAE encodes them.

    Raises:
        ValueError: A field is missing or out of its range, or fields contradict each other.
    """

    verify: str | None = None
    """Only verify this finished folder: check the SHA-256 of every shard."""
    data: str = ""
    """Images: folder:PATH, with one folder of images per class, or hub:NAME, a `datasets` repository; required."""
    dataset_config_name: str | None = None
    """Configuration of a data set on the Hub; None if it has only one."""
    dataset_split: str | None = None
    """Split to encode, or sub-folder of a folder; None for the split train, or the folder itself."""
    image_column: str = "image"
    """Column with images."""
    label_column: str = "label"
    """Column with class labels."""
    caption_column: str | None = None
    """Column with captions, to store instead of labels, or several as for training, all of which are stored."""
    cache_text_embeddings: bool = False
    """Also store the captions encoded by the text encoders of pretrained_text_pipeline."""
    pretrained_text_pipeline: str | None = None
    """Text-to-image pipeline of diffusers whose text encoders are used."""
    text_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the text encoders and of the stored text embeddings."""
    max_sequence_length: int | None = None
    """Maximal number of tokens of a caption; None for the pipeline's own limit."""
    pretrained_vision_encoder: str | None = None
    """A DINOv2, DINOv3, SigLIP or CLIP whose patch features are stored too, for training with alignment."""
    features_dtype: Literal["float16", "bfloat16"] = "float16"
    """Precision in which the patch features are stored."""
    features_patch_size: int = 2
    """Patch size of the model to be trained; one patch feature is stored for each of its tokens."""
    call_options: str = "{}"
    """Arguments of the pipeline's call as JSON, as for training; only those that affect how captions are encoded are
    used."""
    aspect_ratio_buckets: str | None = None
    """Sizes of images in pixels, such as "256,256;224,288;288,224", heights first, instead of --resolution."""
    cache_dir: str | None = None
    """Where downloaded data are kept; None for the cache of `datasets`."""
    background: str = "white"
    """Colour put behind transparent images, such as white or #808080."""
    flip: bool = False
    """Also encode the mirrored images."""
    max_corrupt_images: int = 100
    """Unreadable images that are left out; one more is an error."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the VAE."""
    shard_size: int = 10_000
    """Images per shard."""
    batch_size: int = 32
    """Images per process and forward pass."""
    dataloader_num_workers: int = 0
    """Processes that decode images, per process."""

    def needed(self) -> tuple[str, ...]:
        return super().needed() if self.aspect_ratio_buckets is None else ("pretrained_vae_name_or_path",)

    @property
    def captions(self) -> CaptionColumns | None:
        return None if self.caption_column is None else parse_caption_columns(self.caption_column)

    @property
    def buckets(self) -> Buckets | None:
        return None if self.aspect_ratio_buckets is None else Buckets.parse(self.aspect_ratio_buckets)

    def __post_init__(self):
        if self.verify is not None:
            return
        super().__post_init__()
        if self.aspect_ratio_buckets is not None and self.resolution is not None:
            raise ValueError(f"Expected --resolution or --aspect_ratio_buckets, got both. Drop {self.resolution}.")
        if self.cache_text_embeddings and None in (self.caption_column, self.pretrained_text_pipeline):
            raise ValueError("Expected --caption_column and --pretrained_text_pipeline with --cache_text_embeddings.")
        of_text = self.pretrained_text_pipeline, self.max_sequence_length, self.call_options
        if not self.cache_text_embeddings and of_text != (None, None, "{}"):
            raise ValueError("Expected --cache_text_embeddings with the flags of the text encoder, got none.")
        if self.data.partition(":")[0] not in ("folder", "hub") or not self.data.partition(":")[2]:
            raise ValueError(f"Expected --data folder:PATH or hub:NAME, got {self.data!r}.")
        check_at_least(self, 1, "shard_size", "batch_size", "max_sequence_length", "features_patch_size")
        check_at_least(self, 0, "max_corrupt_images", "dataloader_num_workers")


IMAGENET = {"data": "hub:ILSVRC/imagenet-1k", "pretrained_vae_name_or_path": "stabilityai/sd-vae-ft-ema"}
IMAGENET |= {"flip": True, "dataloader_num_workers": 8}
RECIPES = {
    "imagenet256": IMAGENET | {"resolution": 256, "batch_size": 64, "output_dir": "imagenet256-latents"},
    "imagenet512": IMAGENET | {"resolution": 512, "batch_size": 16, "output_dir": "imagenet512-latents"},
}


def recipe_settings(name: str) -> dict[str, Any]:
    """Settings of the latents that train_tread.py's recipes for ImageNet train on."""
    if name not in RECIPES:
        raise ValueError(f"Expected a recipe among {list(RECIPES)}, got {name!r}.")
    return RECIPES[name]


def open_source(config: PrecomputeConfig, state: PartialState):
    """Opens the images, undecoded, with labels or captions, and the names of their classes."""
    kind, _, name = config.data.partition(":")
    with state.main_process_first():  # one process fills the cache of `datasets`
        return open_images(
            name if kind == "hub" else None,
            train_data_dir=name if kind == "folder" else None,
            dataset_config_name=config.dataset_config_name,
            split=config.dataset_split,
            image_column=config.image_column,
            label_column=config.label_column,
            captions=config.captions,
            num_classes=config.num_classes,
            cache_dir=config.cache_dir,
        )


def describe_source(config: PrecomputeConfig, source) -> dict[str, Any]:
    """Describes where the images come from, without paths of this machine."""
    kind, _, name = config.data.partition(":")
    conditions = [config.label_column] if config.captions is None else config.captions.names
    common = {"split": config.dataset_split or "train", "columns": [config.image_column, *conditions]}
    if kind == "folder":
        return {"train_data_dir": Path(name).resolve().name} | common
    # `datasets` names the folder in its cache after the commit.
    files = [file["filename"] for file in source.cache_files]
    commit = re.search(r"/([0-9a-f]{40})/", files[0]) if files else None
    revision = commit[1] if commit else None
    return {"dataset_name": name, "config": config.dataset_config_name, "revision": revision} | common


def digest_labels(source, label_column: str) -> str:
    labels = source.select_columns(label_column).with_format("numpy")[:][label_column]
    return hashlib.sha256(np.asarray(labels, dtype="<i8")).hexdigest()


def open_captions(config: PrecomputeConfig, source, state: PartialState) -> CaptionStore:
    """Opens the captions, and the text encoders if encoded captions are stored."""
    encoder = None
    if config.cache_text_embeddings:
        options = {"dtype": config.text_dtype, "max_sequence_length": config.max_sequence_length}
        options["call_options"] = read_json(config.call_options)
        with state.main_process_first():
            encoder = load_prompt_encoder(config.pretrained_text_pipeline, device=state.device, **options)
    return CaptionStore(source, config.captions, encoder)


def open_features(config: PrecomputeConfig, state: PartialState) -> FeatureStore | None:
    """Opens the vision encoder; None if no features are stored."""
    if config.pretrained_vision_encoder is None:
        return None
    with state.main_process_first():
        return FeatureStore(
            config.pretrained_vision_encoder, dtype=config.features_dtype, patch_size=config.features_patch_size
        )


def make_writer(
    config: PrecomputeConfig,
    source,
    id2label: dict[int, str],
    vae: LoadedVAE,
    text: CaptionStore | None,
    features: FeatureStore | None,
) -> tuple[LatentsWriter, list[Sequence[int]]]:
    """Makes the writer of the folder, and the rows of the source for each of its shards."""
    # Description.
    known = {"source": describe_source(config, source), "id2label": id2label, "num_samples": len(source)}
    known |= {"has_flipped": config.flip, "captions": text.names if text else (), "text": text and text.info}
    known["patch_features"] = features and features.info
    info = describe_latents(config, vae, buckets=config.buckets, **known)

    # Rows of each shard.
    rows_of_sizes = [range(len(source))]
    if config.buckets is not None:
        bucket_ids = on_main_process(lambda: assign_buckets(source, config.image_column, config.buckets))
        rows_of_sizes = [np.flatnonzero(bucket_ids == bucket).tolist() for bucket in range(len(info.latent_sizes))]
    plan, places = plan_shards(rows_of_sizes, config.shard_size)

    # Writer.
    writer = LatentsWriter(
        config.output_dir,
        info,
        num_shards=len(plan),
        max_unreadable=config.max_corrupt_images,
        size_places=places,
        empty_text=text and text.empty,
    )
    return writer, plan


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PrecomputeConfig, argv, description=__doc__.split("\n")[0], recipe_settings=recipe_settings)
    if config.verify is not None:
        info = verify_latents(config.verify)
        print(f"{config.verify}: {len(info.shards)} shards with {info.num_samples} records are as they were written.")
        return

    # Load and check everything before the long work starts. A long timeout: processes may wait hours for the one that
    # downloads the images, and for the slowest one at the end.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    torch.backends.cudnn.allow_tf32 = False  # by default NVIDIA's convolutions round float32; use --vae_dtype for that
    if config.push_to_hub:  # to find a token without write access now
        on_main_process(lambda: open_repo(config.hub_dataset_id, repo_type="dataset", private=config.hub_private))
    source, id2label = open_source(config, state)
    place = {"subfolder": config.vae_subfolder, "revision": config.vae_revision}
    vae = load_vae(config.pretrained_vae_name_or_path, **place, dtype=config.vae_dtype, device=state.device)
    text = None if config.captions is None else open_captions(config, source, state)
    features = open_features(config, state)
    writer, plan = make_writer(config, source, id2label, vae, text, features)
    settings = {
        "num_images": len(source),
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "background": config.background,
    } | ({"captions_sha256": text.digest()} if text else {"labels_sha256": digest_labels(source, config.label_column)})
    if state.is_main_process:
        print(told_sizes(writer, plan, text))

    def open_folder() -> list[int]:
        # A repository's commit already identifies all of its images.
        known = writer.info.source.get("revision") is not None
        columns = {"image_column": config.image_column, "plan": plan}
        return writer.open(settings, sources=None if known else digest_sources(source, **columns))

    with claim(config.output_dir), stopped_cleanly(argv, kept="finished shards"):
        missing = on_main_process(open_folder)

        # Each process encodes its part of the missing shards.
        begin = time.perf_counter()
        encode_shards(
            writer,
            missing[state.process_index :: state.num_processes],
            source,
            vae.model,
            plan=plan,
            image_column=config.image_column,
            label_column=config.label_column,
            batch_size=config.batch_size,
            encode_captions=text and text.encode,
            encode_features=features and features.encode,
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
    if state.is_main_process:  # after the lock is gone, which must not be uploaded
        share_latents(config, info)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
