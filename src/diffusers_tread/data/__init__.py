# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Training data: images with labels or captions, precomputed latents, and sources of your own."""

from .batch_sampler import EpochBatchSampler
from .buckets import BucketBatchSampler, Buckets, assign_buckets
from .captions import CaptionColumns, parse_caption_columns
from .folders import ClassFolders, list_class_folders, list_images
from .images import UnreadableImage, center_crop, image_size, image_to_tensor, load_image, load_record
from .labelled_images import DigitsDataset, ImageDataset, collate_images, open_images
from .latents import (
    LatentCodec,
    LatentsDataset,
    LatentsInfo,
    LatentsWriter,
    StreamingLatentsDataset,
    check_vae,
    decode_latents,
    encode_images,
    encode_moments,
    latent_codec,
    latents_from_moments,
    open_latents,
    verify_latents,
)
from .loading import make_batches, open_training_data
from .source import SOURCES, LatentsSource, TrainingSource, open_source, register_source
from .streaming import StreamingImageDataset


__all__ = [
    "SOURCES",
    "BucketBatchSampler",
    "Buckets",
    "CaptionColumns",
    "ClassFolders",
    "DigitsDataset",
    "EpochBatchSampler",
    "ImageDataset",
    "LatentCodec",
    "LatentsDataset",
    "LatentsInfo",
    "LatentsSource",
    "LatentsWriter",
    "StreamingImageDataset",
    "StreamingLatentsDataset",
    "TrainingSource",
    "UnreadableImage",
    "assign_buckets",
    "center_crop",
    "check_vae",
    "collate_images",
    "decode_latents",
    "encode_images",
    "encode_moments",
    "image_size",
    "image_to_tensor",
    "latent_codec",
    "latents_from_moments",
    "list_class_folders",
    "list_images",
    "load_image",
    "load_record",
    "make_batches",
    "open_images",
    "open_latents",
    "open_source",
    "open_training_data",
    "parse_caption_columns",
    "register_source",
    "verify_latents",
]
