# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What recipes are said to take, against the guide, sums by hand and what was measured."""

from pathlib import Path

import pytest
import recipe_costs
import torch

from diffusers_tread import TREADTransformer2DModel


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=recipe_costs.RECIPES)
def cost(request):
    return request.param, recipe_costs.recipe_cost(request.param)


def test_the_guide_has_the_counted_numbers(cost, monkeypatch):
    name, counted = cost
    monkeypatch.setattr(recipe_costs, "recipe_cost", lambda name: counted)
    assert f"\n{recipe_costs.table_row(name)}\n" in (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")


def test_hours_and_memory_are_sums_of_their_parts(cost):
    name, counted = cost
    flops = counted.num_images * (counted.model + counted.projectors + counted.encoder + counted.vae)
    assert counted.hours == pytest.approx(flops / (8 * 989e12) / 0.4 / 3600)
    if name == "imagenet256_repa_xl2":
        assert counted.projectors == 6 * 128 * (1152 * 2048 + 2048 * 2048 + 2048 * 768)  # 128 kept tokens
        assert counted.encoder / 2 == pytest.approx(12 * (257 * 12 * 768**2 + 2 * 257**2 * 768), rel=0.01)
        assert counted.num_images == 400_000 * 256


def test_what_a_forward_keeps_is_near_what_was_measured():
    with torch.device("meta"):
        model = TREADTransformer2DModel.from_preset("S/2")
    measured = {"dense": 92.1, "routed": 65.9}  # MiB per image, in docs/performance.md
    assert all(str(value) in (ROOT / "docs/performance.md").read_text(encoding="utf-8") for value in measured.values())
    for kind, ratio in (("dense", 0.0), ("routed", None)):
        counted = recipe_costs.activation_bytes(model, torch.float32, selection_ratio=ratio) / 2**20
        assert counted == pytest.approx(1.09 * measured[kind], rel=0.02)
