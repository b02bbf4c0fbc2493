# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A model small enough for a test, with weights that make every part of it count."""

import sys
from pathlib import Path

import pytest
import torch

from diffusers_tread import TREADTransformer2DModel


sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make_model():
    def make(**changes):
        config = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 6,
            "in_channels": 3,
            "sample_size": 8,
            "patch_size": 2,
            "num_classes": 5,
            "routes": [{"start": 1, "end": 2, "selection_ratio": 0.5}],
        }
        model = TREADTransformer2DModel(**{**config, **changes})
        # adaLN-Zero starts as a network without effect: give all weights a value.
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        return model

    return make


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def inputs():
    """Latents, timesteps and labels (5 is the null class)."""
    return torch.randn(3, 3, 8, 8), torch.randn(3), torch.tensor([0, 5, 2])
