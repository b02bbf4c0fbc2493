# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A pipeline of every kind of component, and images of it."""

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusers_tread import EDMHeunScheduler, RatioSchedule, SparseGuidance, TREADPipeline, TREADTransformer2DModel


def make_pipeline() -> TREADPipeline:
    """Weights that make the output depend on everything: at initialisation it would be 0."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "sample_size": 8, "num_classes": 5}
    modern = {"norm": "rms_norm", "qk_norm": "rms_norm", "ffn": "swiglu", "positions": "rope", "value_residual": True}
    transformer, earlier = [TREADTransformer2DModel(**config, **options, objective="edm") for options in ({}, modern)]
    for parameter in [*transformer.parameters(), *earlier.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    guider = SparseGuidance(
        guidance_scale=1.6, strong_ratio=RatioSchedule(first=0.0, last=0.3),
        weak_ratio=RatioSchedule(first=0.8, last=0.4), weak_checkpoint=True,
    )  # fmt: skip
    return TREADPipeline(
        transformer, EDMHeunScheduler(s_churn=10.0), vae=vae, guider=guider, guidance_transformer=earlier,
        id2label={0: "ant", 3: "bee"},
    )  # fmt: skip


def sample(pipeline) -> np.ndarray:
    """Two images as float32, from generators of their own."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipeline([3, 0], num_inference_steps=3, generator=generators, output_type="np").images


def same(images: np.ndarray, others: np.ndarray) -> bool:
    """But for rounding: weights from a file lie at other addresses than fresh ones, where sums may round otherwise."""
    return bool(np.allclose(images, others, rtol=0, atol=1e-4))
