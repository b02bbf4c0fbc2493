# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance in a pipeline of diffusers that takes a guider, on a hooked transformer."""

import tiny_transformers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline

from diffusers_tread import RoutingCall, SparseGuidance, TokenRoute, apply_token_routing, token_routing


def hunyuan_image_pipeline():
    """Without text encoders and VAE: the calls below bring embeddings and ask for latents."""
    torch.manual_seed(0)
    config = {"num_layers": 3, "text_embed_2_dim": 10, "patch_size": (1, 1), "rope_axes_dim": (4, 4)}
    transformer = tiny_transformers.make("HunyuanImageTransformer2DModel", **config)
    components = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = HunyuanImagePipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **components
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline):
    embeddings = {}
    generator = torch.Generator().manual_seed(1)
    for prefix in ("", "negative_"):
        for suffix, length, width in (("", 5, 12), ("_2", 4, 10)):
            embeddings[f"{prefix}prompt_embeds{suffix}"] = torch.randn(1, length, width, generator=generator)
            embeddings[f"{prefix}prompt_embeds_mask{suffix}"] = torch.ones(1, length, dtype=torch.int64)
    return pipeline(
        **embeddings, height=256, width=256, num_inference_steps=1, output_type="latent", generator=generator
    ).images


def test_one_step_is_the_weighted_mean_of_a_strong_and_a_weak_one():
    pipeline = hunyuan_image_pipeline()
    router = apply_token_routing(pipeline.transformer, TokenRoute(start=2, end=-4))
    router.defaults = RoutingCall(seed=3)

    # An Euler step is affine in the prediction, so the guided step is the same mean of the branches' own steps.
    with token_routing(pipeline.transformer, selection_ratio=0.2):
        strong = sample(pipeline)
    with token_routing(pipeline.transformer, selection_ratio=0.8):
        weak = sample(pipeline)
    assert (strong - weak).abs().max() > 1e-3

    pipeline.guider = SparseGuidance(guidance_scale=1.6, strong_ratio=0.2, weak_ratio=0.8)
    torch.testing.assert_close(sample(pipeline), 1.6 * strong - 0.6 * weak, atol=1e-5, rtol=1e-5)
    assert not router.is_routing(training=False)
