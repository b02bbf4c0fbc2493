# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .images import DigitsDataset, ImageDataset, center_crop, collate_images, image_to_tensor, open_images
from .latents import encode_images
from .loading import make_batches, open_training_data
from .sampling import EpochBatchSampler, derive_seed
from .streaming import StreamingImageDataset


__all__ = [
    "DigitsDataset",
    "EpochBatchSampler",
    "ImageDataset",
    "StreamingImageDataset",
    "center_crop",
    "collate_images",
    "derive_seed",
    "encode_images",
    "image_to_tensor",
    "make_batches",
    "open_images",
    "open_training_data",
]
