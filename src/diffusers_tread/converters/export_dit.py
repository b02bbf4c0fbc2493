# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Exports our transformer in DiT's layout."""

import torch

from ..models import TREADTransformer2DModel
from .layouts import dit_names, rename_back


def export_dit(transformer: TREADTransformer2DModel) -> dict[str, torch.Tensor]:
    """Converts our transformer's weights to DiT's layout, with `pos_embed`; they load into a DiT with `strict=True`.

    Raises:
        ValueError: The model is not a plain DiT: it has other settings than DiT, fused projections, or adapters.
    """
    config = transformer.config
    plain = {"timestep_scale": 1.0, "attention_bias": True, "norm_eps": 1e-6, "ff_norm_eps": None, "freq_shift": 0}
    plain |= {"norm": "layer_norm", "qk_norm": None, "ffn": "gelu-approximate"}
    plain |= {"positions": "sincos", "value_residual": False}
    others = {name: config[name] for name, value in plain.items() if config[name] != value}
    if others:
        raise ValueError(f"Expected a model with DiT's settings {plain}, got {others}.")
    tensors = rename_back(transformer.state_dict(), dit_names(config.num_layers))
    return tensors | {"pos_embed": transformer.position_table[None].clone()}
