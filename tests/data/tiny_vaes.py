# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Tiny VAEs of every kind that the codec knows, with statistics that are not 0 and 1. All halve images."""

import diffusers
import pytest
import torch


MEAN, STD = [0.5, -1.0, 2.0, 0.25], [0.5, 2.0, 4.0, 0.75]
_BLOCKS = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
_VIDEO = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True],
    "latents_mean": MEAN, "latents_std": STD,
}  # fmt: skip
_VAES = {
    "sd": ("AutoencoderKL", {**_BLOCKS, "scaling_factor": 0.5}),
    "flux": ("AutoencoderKL", {**_BLOCKS, "scaling_factor": 0.5, "shift_factor": 0.1}),
    "sdxl": ("AutoencoderKL", {**_BLOCKS, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}),
    "flux2": ("AutoencoderKLFlux2", {**_BLOCKS, "sample_size": 16}),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4, "attention_head_dim": 8, "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock", "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()), "scaling_factor": 0.41,
        },
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1), "scaling_factor": 0.5,
        },
    ),
    "wan": ("AutoencoderKLWan", _VIDEO),
    "qwen": ("AutoencoderKLQwenImage", _VIDEO),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 4, "block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
            "down_block_types": ("LTXVideoDownBlock3D",) * 2, "layers_per_block": (1,) * 3,
            "decoder_layers_per_block": (1,) * 3, "spatio_temporal_scaling": (True, False),
            "decoder_spatio_temporal_scaling": (True, False), "decoder_inject_noise": (False,) * 3,
            "downsample_type": ("conv",) * 2, "upsample_residual": (False,) * 2, "upsample_factor": (1, 1),
            "patch_size": 1, "scaling_factor": 0.5,
        },
    ),
    "rae": (
        "AutoencoderRAE",
        {
            "encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 2, "encoder_num_hidden_layers": 1,
            "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16, "patch_size": 2, "encoder_input_size": 16, "scaling_factor": 0.5,
            "latents_mean": [[[0.5]]] * 64, "latents_std": [[[2.0]]] * 64,
        },
    ),
}  # fmt: skip
KINDS = tuple(_VAES)


def make_vae(kind, **changes):
    """A VAE of one of `KINDS`, the same in every call; skips the test where this diffusers has none."""
    name, config = _VAES[kind]
    if not hasattr(diffusers, name):
        pytest.skip(f"This diffusers has no {name}.")
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**config | changes).eval().requires_grad_(False)
    if kind == "flux2":
        vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
        vae.bn.running_var.copy_(torch.linspace(0.5, 4, 16))
    if kind == "ltx":
        vae.latents_mean.copy_(torch.tensor(MEAN))
        vae.latents_std.copy_(torch.tensor(STD))
    return vae
