# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What TREADRWKV2DModel refuses and keeps; what holds for every denoiser is in test_every_backbone.py."""

import pytest
import torch
from backbones import make_backbone

from diffusers_tread import TREADRWKV2DModel


pytestmark = pytest.mark.filterwarnings("ignore:The route ends at block")


def test_routes_of_single_tokens_are_refused():
    route = {"start": 1, "end": 3, "selection_ratio": 0.5}
    for routes in ([route], [route | {"end": 1, "unit": "row"}, route | {"start": 2}]):
        with pytest.raises(ValueError, match=r"of unit 'row'.*got \['token'\].*unit='row'"):
            TREADRWKV2DModel(hidden_size=16, num_layers=6, sample_size=8, routes=routes)


def test_the_default_route_keeps_rows():
    model = TREADRWKV2DModel(hidden_size=16, num_layers=6, sample_size=8)
    assert model.config.routes == [{"start": 2, "end": 2, "selection_ratio": 0.5, "unit": "row"}]


def test_kept_tokens_that_are_no_rows_are_refused():
    model = make_backbone("rwkv")
    inputs = torch.randn(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="whole rows of 4 tokens, got 6 tokens"):
        model(*inputs, kept_token_ids=[torch.arange(6).expand(2, -1)])
    model(*inputs, kept_token_ids=[torch.arange(8).expand(2, -1)])


def test_decay_and_bonus_are_loaded_in_float32(tmp_path):
    make_backbone("rwkv").save_pretrained(tmp_path)
    model = TREADRWKV2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = {name for name, one in model.named_parameters() if one.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"log_decay", "bonus"} and len(kept) == 2 * 6
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("preset, millions", [("RWKV-S/2", 35), ("RWKV-B/2", 137)])
def test_presets_have_vision_rwkvs_sizes(preset, millions):
    """Its S and B have 13 D^2 weights in each of 12 blocks (23.8M and 93.7M in all); adaLN-Zero adds 6 D^2."""
    with torch.device("meta"):
        model = TREADRWKV2DModel.from_preset(preset, num_classes=1000)
    dim = model.config.hidden_size
    products = sum(one.numel() for name, one in model.transformer_blocks.named_parameters() if name.endswith("weight"))
    assert products == 12 * (13 + 6) * dim**2
    assert round(sum(one.numel() for one in model.parameters()) / 1e6) == millions
