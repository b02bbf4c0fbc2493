# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Tiny models and recordings for the pipeline tests."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from diffusers_tread import EDMHeunScheduler, TokenRouter, TREADPipeline, TREADTransformer2DModel, get_token_router
from diffusers_tread.objectives import OBJECTIVES


sys.path.insert(0, str(Path(__file__).parent))  # for the module beside this one


@pytest.fixture
def objective_of():
    """Tells the name of the objective whose models a scheduler samples from."""
    return lambda scheduler: next(name for name, objective in OBJECTIVES.items() if objective.accepts(scheduler))


@pytest.fixture
def make_transformer():
    """Makes routed models whose output depends on everything: at initialisation it would be 0."""

    def make(**settings):
        defaults = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "in_channels": 3}
        defaults |= {"sample_size": 8, "patch_size": 2, "num_classes": 5}
        model = TREADTransformer2DModel(**(defaults | settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def make_pipeline(make_transformer, objective_of):
    """Makes quiet pipelines; what is not given is a model of pixels with Heun's method."""

    def make(scheduler=None, transformer=None, **components):
        scheduler = scheduler or EDMHeunScheduler()
        if transformer is None:
            transformer = make_transformer(objective=objective_of(scheduler))
        pipe = TREADPipeline(transformer, scheduler, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def make_vae():
    """Makes VAEs that shrink images four (KL) or two (DC) times, with scale and shift."""

    def make(kind, latent_channels=3):
        if kind == "kl":
            return AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=latent_channels,
                scaling_factor=0.18, shift_factor=0.1,
            ).eval()  # fmt: skip
        blocks = {"block_types": ["ResBlock"] * 2, "block_out_channels": [6, 6], "layers_per_block": [1, 1]}
        blocks |= {"qkv_multiscales": [[], []]}
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
        sides |= {"upsample_block_type": "interpolate", "downsample_block_type": "conv", "attention_head_dim": 3}
        return AutoencoderDC(latent_channels=latent_channels, scaling_factor=0.4, **sides).eval()

    return make


@pytest.fixture
def counters():
    """Dynamo's counters, from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters["stats"]


@pytest.fixture
def generators():
    """Makes one generator per seed."""
    return lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def out_of_memory():
    """Lets a model fail in its fourth block; returns the hook."""

    def error(module, inputs):
        raise RuntimeError("out of memory")

    return lambda model: model.transformer_blocks[3].register_forward_pre_hook(error)


@pytest.fixture
def record_calls(monkeypatch):
    """Records (latents, timestep, labels) of every forward of a model, and what its router planned."""

    def record(model):
        calls, plans = [], []
        router, plan = get_token_router(model), TokenRouter.plan

        def recorded(self, *args, **kwargs):
            planned = plan(self, *args, **kwargs)
            if self is router:
                plans.append(planned)
            return planned

        monkeypatch.setattr(TokenRouter, "plan", recorded)
        model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args[0].clone(), args[1], kwargs["class_labels"])), with_kwargs=True
        )
        return calls, plans

    return record
