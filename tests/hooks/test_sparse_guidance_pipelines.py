# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance on a hooked transformer in Modular Diffusers."""

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance

from diffusers_tread import SparseGuidance, TokenRoute, apply_token_routing, get_token_router


pytest.importorskip("transformers")
if not hasattr(diffusers, "StableDiffusion3AutoBlocks"):
    pytest.skip("this diffusers has no modular SD3", allow_module_level=True)

from tiny_pipelines import sd3_pipeline  # noqa: E402


@pytest.fixture
def pipeline(tmp_path):
    """A modular SD3 with a routed transformer."""
    parts = sd3_pipeline(tmp_path / "parts")
    with torch.no_grad():  # some gates start at zero
        for parameter in parts.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    blocks = diffusers.StableDiffusion3AutoBlocks()
    pipeline = blocks.init_pipeline()
    names = [spec.name for spec in blocks.expected_components if hasattr(parts, spec.name)]
    pipeline.update_components(**{name: getattr(parts, name) for name in names})
    apply_token_routing(pipeline.transformer, TokenRoute(start=2, end=-4))
    pipeline.transformer.eval()
    return pipeline


def sample(pipeline, guider):
    pipeline.update_components(guider=guider)
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output": "images", "output_type": "pt"}
    return pipeline(prompt="a red", generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.filterwarnings("ignore")
def test_each_step_runs_a_strong_and_a_weak_branch_and_leaves_the_router_as_it_was(pipeline):
    router, ratios = get_token_router(pipeline.transformer), []
    pipeline.transformer.register_forward_pre_hook(
        lambda *_: ratios.append(router.resolve().selection_ratio if router.is_routing(training=False) else None)
    )
    guided = sample(pipeline, SparseGuidance(guidance_scale=1.6, strong_ratio=0.25, weak_ratio=0.75))
    assert ratios == [0.25, 0.75] * 2
    assert not router.is_routing(training=False)

    ratios.clear()
    plain = sample(pipeline, ClassifierFreeGuidance(guidance_scale=1.0))
    assert ratios == [None] * 2
    assert (guided - plain).abs().max() > 1e-3
