# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A network of a few weights, a pipeline and images, small enough to evaluate in a moment."""

import numpy as np
import PIL.Image
import torch

from diffusers_tread import EDMHeunScheduler, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.metrics import FeatureExtractor


class TinyExtractor(FeatureExtractor):
    """Six features, eight spatial ones and logits of four classes, each by a random linear map of a tiny image."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        widths = {"features": 6, "spatial": 8, "logits": 4}
        network = torch.nn.ModuleDict({name: torch.nn.Linear(48, width) for name, width in widths.items()})
        super().__init__(network, name="tiny", outputs=tuple(network), settings={})

    def extract(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)
        return {name: layer(small) for name, layer in self.network.items()}


def make_pipeline(channels=3, **components):
    torch.manual_seed(1)
    transformer = TREADTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=6, in_channels=channels, sample_size=8, num_classes=5
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = TREADPipeline(transformer, EDMHeunScheduler(s_churn=5.0), **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(seed, count, height=8, width=8):
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_images(folder, images):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder
