# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A tiny config of each backbone, for the tests that hold for all of them."""

import torch

from diffusers_tread.models import DENOISERS, LatentDenoiser


SHARED = {"num_layers": 6, "in_channels": 3, "sample_size": 8, "patch_size": 2, "num_classes": 5, "objective": "flow"}
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8}
MODERN = {
    "norm": "rms_norm",
    "qk_norm": "rms_norm",
    "ffn": "swiglu",
    "positions": "sincos+rope",
    "value_residual": True,
}
BACKBONES = {
    "transformer": ("TREADTransformer2DModel", ATTENTION),
    "modern transformer": ("TREADTransformer2DModel", ATTENTION | MODERN),
    "mamba": ("TREADMamba2DModel", {"hidden_size": 16, "head_dim": 8, "state_size": 8}),
    "rwkv": ("TREADRWKV2DModel", {"hidden_size": 16}),
}


def route_of(name: str, start: int = 1, end: int = 3) -> dict:
    """A route of tokens or rows, as the backbone's default has it."""
    class_name, config = BACKBONES[name]
    (default,) = DENOISERS[class_name](**SHARED | config).token_router.routes
    return {"start": start, "end": end, "selection_ratio": 0.5, "unit": default.unit}


def make_backbone(name: str, *, fresh: bool = False, **changes) -> LatentDenoiser:
    """A model of four rows of four tokens that routes half of them past blocks 1 to 3; always the same weights.

    Args:
        name: One of BACKBONES.
        fresh: With the weights of its initialisation; else with such that all parts count.
        **changes: Of its config.
    """
    class_name, config = BACKBONES[name]
    config = SHARED | config | {"routes": [route_of(name)]} | changes
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DENOISERS[class_name](**config)
        if not fresh:
            # Beside what they start with: a decay has a range of its own.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model
