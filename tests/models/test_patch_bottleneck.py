# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The patch embedding through few channels: its formula, its weights, its FLOPs."""

import numpy as np
import pytest
import torch
from backbones import BACKBONES, make_backbone

from diffusers_tread import TREADTransformer2DModel
from diffusers_tread.flops import forward_flops


def tokens_of(model, latents):
    """What the first block gets, without the positions."""
    seen = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(latents, torch.tensor(0.5), torch.tensor([0, 1]))
    hook.remove()
    return seen[0] - model.position_table


@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_are_two_matrices_times_the_patches(name, tmp_path):
    model = make_backbone(name, patch_bottleneck_dim=3)
    model.save_pretrained(tmp_path)
    latents = torch.randn(2, 3, 8, 8)
    found = tokens_of(type(model).from_pretrained(tmp_path), latents)

    # Patches row by row, their values by channel, row and column.
    cut = latents.double().numpy().reshape(2, 3, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, 16, 12)
    first, second = (model.patch_embedding[index].weight.detach().double().flatten(1).numpy() for index in (0, 1))
    assert first.shape == (3, 12) and second.shape == (16, 3) and model.patch_embedding[0].bias is None
    expected = cut @ first.T @ second.T + model.patch_embedding[1].bias.detach().double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_both_matrices_start_as_xavier_has_them_and_cost_what_they_multiply():
    size = {"sample_size": 64, "patch_size": 16, "in_channels": 3, "num_layers": 4, "routes": None}
    plain = TREADTransformer2DModel(**size)
    model = TREADTransformer2DModel(**size, patch_bottleneck_dim=32)
    for layer, fan_in, fan_out in ((model.patch_embedding[0], 768, 32), (model.patch_embedding[1], 32, 384)):
        limit = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.98 * limit < layer.weight.abs().max() <= limit
    assert not model.patch_embedding[1].bias.any() and model.patch_embedding.out_channels == 384

    difference = forward_flops(model).linear - forward_flops(plain).linear
    assert difference == 2 * 16 * (768 * 32 + 32 * 384 - 768 * 384)  # of 16 tokens
    assert model.num_parameters() - plain.num_parameters() == 768 * 32 + 32 * 384 - 768 * 384


def test_it_is_off_by_default_and_no_channels_are_refused():
    assert type(make_backbone("transformer").patch_embedding) is torch.nn.Conv2d
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=f"Expected patch_bottleneck_dim >= 1, or None for none, got {wrong}"):
            make_backbone("transformer", patch_bottleneck_dim=wrong)


@pytest.mark.parametrize("preset, size", [("JiT-B/16", 131), ("JiT-L/16", 459)])  # millions, in the paper's table
def test_presets_have_jits_sizes_but_for_its_class_tokens(preset, size):
    with torch.device("meta"):
        model = TREADTransformer2DModel.from_preset(preset, objective="jit")
    assert model.num_parameters() / 1e6 == pytest.approx(size, rel=0.01)
    assert model.config.sample_size // model.config.patch_size == 16
