# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Random models and images, small enough for tests."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_tread import TREADTransformer2DModel


SIZE = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6}


def make_transformer(*, std=0.2, **config):
    """Of grey 8x8 images of four classes, whose output depends on everything: at initialisation it would be 0."""
    config = {"objective": "flow", "in_channels": 1, "sample_size": 8, "num_classes": 4} | config
    transformer = TREADTransformer2DModel(**SIZE, **config)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return transformer


def save_vae(folder, *, seed=0, **config):
    """Of latents half as large as the images."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, **config)
    vae.save_pretrained(folder)
    return vae


def save_extractor(folder):
    """A DINOv2 of 16 features."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    normalisation = {"size": 28, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))


def save_noise(folder, *shape, seed=0):
    """Images of noise, 00.png and so on; shape: their number, height and width."""
    folder.mkdir(parents=True)
    for index, pixels in enumerate(np.random.RandomState(seed).randint(0, 256, (*shape, 3), dtype=np.uint8)):
        PIL.Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:300])
