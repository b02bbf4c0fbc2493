# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The device of these tests: the accelerator, or what DEVICE names, so that they can be tried without one."""

import os

import pytest
import torch

from diffusers_tread import TREADTransformer2DModel


@pytest.fixture
def device():
    if name := os.environ.get("DEVICE"):
        return torch.device(name)
    if not torch.accelerator.is_available():
        pytest.skip("needs an accelerator, or DEVICE=cpu")
    return torch.accelerator.current_accelerator()


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture
def make_model(device):
    """Makes models of 64 tokens in which every weight counts: at initialisation the output would be 0."""

    def make(**changes):
        config = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 8, "in_channels": 4}
        config |= {"sample_size": 16, "patch_size": 2, "num_classes": 10, "objective": "flow"}
        model = TREADTransformer2DModel(**{**config, **changes})
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        return model.to(device)

    return make


@pytest.fixture
def batch(device):
    """Latents and labels of eight samples."""
    return torch.randn(8, 4, 16, 16).to(device), torch.arange(8).to(device)
