# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The analytic count against torch's counter, which sees the operators that run, and against the papers' figures."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_tread import RatioSchedule, SparseGuidance, TokenRoute, TREADTransformer2DModel, token_routing
from diffusers_tread.flops import block_flops_saved, flop_ceiling, forward_flops, guidance_flops, training_flops


def preset(name, **settings):
    """A model without memory: the counters look at shapes only."""
    with torch.device("meta"):
        return TREADTransformer2DModel.from_preset(name, **settings)


def counted_flops(model, *, size, selection_ratio, backward=False):
    """What torch counts for one sample: (linear layers and convolutions, attention)."""
    device = next(model.parameters()).device
    inputs = torch.zeros(1, model.config.in_channels, size, size, device=device), torch.zeros(1, device=device)
    # Decomposed attention: not every torch release knows the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with token_routing(model, enabled=True, selection_ratio=selection_ratio):
            output = model(*inputs).sample
        if backward:
            output.sum().backward()
    by_operator = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = by_operator.pop("aten.bmm", 0)
    return sum(by_operator.values()), attention


@pytest.mark.parametrize("name", ["S/2", "B/4", "XL/2"])
@pytest.mark.parametrize("selection_ratio", [0.0, 0.5, 0.9])
def test_a_forward_has_the_flops_that_torch_counts(name, selection_ratio):
    model = preset(name)
    flops = forward_flops(model, selection_ratio=selection_ratio)
    assert (flops.linear, flops.attention) == counted_flops(model, size=32, selection_ratio=selection_ratio)


def test_a_forward_has_the_flops_that_torch_counts_with_odd_settings_and_two_routes():
    routes = [TokenRoute(start=1, end=2, selection_ratio=0.3), TokenRoute(start=4, end=5, selection_ratio=0.7)]
    model = TREADTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=20,
        num_layers=9,
        in_channels=3,
        out_channels=5,
        sample_size=12,
        patch_size=3,
        num_classes=0,
        mlp_ratio=2.5,
        routes=routes,
    )
    flops = forward_flops(model, 5 * 5)
    assert (flops.linear, flops.attention) == counted_flops(model, size=15, selection_ratio=None)


def test_the_config_alone_gives_the_same_count():
    model = preset("S/2")
    assert forward_flops(dict(model.config)) == forward_flops(model)


@pytest.mark.parametrize("name", ["S/2", "B/4"])
@pytest.mark.parametrize("selection_ratio", [0.0, 0.5])
def test_a_forward_and_backward_have_the_flops_that_torch_counts(name, selection_ratio):
    model = preset(name)
    counted = sum(counted_flops(model, size=32, selection_ratio=selection_ratio, backward=True))
    assert training_flops(model, selection_ratio=selection_ratio) == counted
    assert counted == pytest.approx(3 * forward_flops(model, selection_ratio=selection_ratio).total, rel=1e-3)


def test_the_ceiling_of_a_whole_training_step_is_that_of_its_forward():
    # The backward of the first layer has no gradient for the input, which is the whole difference.
    model = preset("B/2")
    dense = sum(counted_flops(model, size=32, selection_ratio=0.0, backward=True))
    routed = sum(counted_flops(model, size=32, selection_ratio=0.5, backward=True))
    assert dense / routed == pytest.approx(flop_ceiling(model), rel=1e-3)


@pytest.mark.parametrize(
    "name, num_tokens, ceiling",
    [
        ("S/2", 256, 1.43),
        ("B/2", 256, 1.43),
        ("L/2", 256, 1.67),
        ("XL/2", 256, 1.72),
        ("XL/2", 1024, 1.78),
        ("XL/2", 4096, 1.95),
    ],
)
def test_the_ceilings_are_those_known_for_the_paper_s_models(name, num_tokens, ceiling):
    # Known to two decimals, some rounded and some cut off.
    assert flop_ceiling(preset(name), num_tokens) == pytest.approx(ceiling, abs=0.0101)


# Guidance.


def gflops_per_step(guider, **settings):
    """As the Sparse Guidance paper counts: multiply-adds of the linear layers, all of each branch of a step."""
    flops = guidance_flops(preset("XL/2"), guider, shared_prefix=False, **settings)
    return flops.linear / len(flops.steps) / 2e9


def test_guidance_of_xl_2_takes_the_gflops_of_the_sparse_guidance_paper():
    # arXiv 2601.01608. Of SG_FID the schedule is ours, which explains the larger difference.
    assert gflops_per_step(ClassifierFreeGuidance()) == pytest.approx(228.84, rel=5e-4)
    assert gflops_per_step(SparseGuidance.from_preset("flops", guidance_scale=1.5)) == pytest.approx(97.67, rel=5e-4)
    assert gflops_per_step(SparseGuidance.from_preset("fid", guidance_scale=1.5)) == pytest.approx(173.16, rel=2e-3)


def test_the_guided_steps_are_the_forwards_that_a_sampler_runs():
    # A schedule and an interval: of 5 steps, 1 to 3 have two branches, with ratios written out.
    model = preset("S/2")
    guider = SparseGuidance(
        strong_ratio=0.1, weak_ratio=RatioSchedule(first=0.8, last=0.4, shape="linear"), start=0.2, stop=0.8
    )
    flops = guidance_flops(model, guider, num_steps=5, shared_prefix=False)
    ratios = [(0.0,), (0.1, 0.7), (0.1, 0.6), (0.1, 0.5), (0.0,)]
    counted = [[counted_flops(model, size=32, selection_ratio=ratio) for ratio in step] for step in ratios]
    assert [(step.linear, step.attention) for step in flops.steps] == [
        tuple(map(sum, zip(*step, strict=True))) for step in counted
    ]
    cfg = 5 * 2 * sum(counted[0][0])
    assert flops.share_of_cfg == pytest.approx(flops.total / cfg) and guider._step is None


def test_the_shared_blocks_count_once():
    # 2 of 28 blocks per guided step, in FLOPs: 24 D^2 per token, 12 D^2 of modulation, 4 N^2 D of attention.
    model, guider = preset("XL/2"), SparseGuidance(strong_ratio=0.5, weak_ratio=0.9, stop=0.6)
    apart, shared = (guidance_flops(model, guider, num_steps=5, shared_prefix=value) for value in (False, True))
    assert shared == guidance_flops(model, guider, num_steps=5)
    linear, attention = 2 * (24 * 256 + 12) * 1152**2, 2 * 4 * 256**2 * 1152
    for step in range(5):
        saved = (linear, attention) if step < 3 else (0, 0)
        one, other = apart.steps[step], shared.steps[step]
        assert (one.linear - other.linear, one.attention - other.attention) == saved
    assert apart.dense == shared.dense

    # Nothing to share: another condition, another model, another kind of guidance.
    for other in (
        SparseGuidance(null_weak_branch=True),
        SparseGuidance(weak_checkpoint=True),
        SparseGuidance(guidance_scale=1.0),
        ClassifierFreeGuidance(),
    ):
        assert guidance_flops(model, other) == guidance_flops(model, other, shared_prefix=False)


def test_the_weak_branch_counts_with_its_own_model():
    main, weak = preset("B/2"), preset("S/2", sample_size=16)
    guider = SparseGuidance(strong_ratio=0.0, weak_ratio=0.75, weak_checkpoint=True)
    branches = [forward_flops(model, 256, selection_ratio=ratio).total for model, ratio in ((main, 0.0), (weak, 0.75))]
    assert guidance_flops(main, guider, num_steps=1, guidance_model_or_config=weak).total == sum(branches)
    same_size = forward_flops(main, selection_ratio=0.75).total
    assert guidance_flops(main, guider, num_steps=1).total == branches[0] + same_size
    alone = SparseGuidance(guidance_scale=1.0, strong_ratio=0.0)
    assert guidance_flops(main, alone, num_steps=1, guidance_model_or_config=weak).total == branches[0]


def test_a_guider_of_the_same_code_under_another_name_counts_likewise():
    # As diffusers makes it from code on the Hub: the same source, another module, another class.
    source = Path(inspect.getsourcefile(SparseGuidance))
    spec = importlib.util.spec_from_file_location("diffusers_tread.guiders.from_the_hub", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    other = module.SparseGuidance.from_preset("fid", guidance_scale=1.5)
    assert not isinstance(other, SparseGuidance)
    ours = SparseGuidance.from_preset("fid", guidance_scale=1.5)
    assert guidance_flops(preset("S/2"), other) == guidance_flops(preset("S/2"), ours)


def test_sampling_needs_a_step():
    with pytest.raises(ValueError, match="num_steps >= 1.*got 0"):
        guidance_flops(preset("S/2"), ClassifierFreeGuidance(), num_steps=0)


def test_the_saved_share_follows_from_the_number_of_routed_blocks():
    # A routed block of width 384 with 128 of 256 tokens: half the linear part, a quarter of the attention.
    linear, attention, modulation = 12 * 384**2 * 256, 2 * 256**2 * 384, 6 * 384**2
    saved = 7 * (linear / 2 + attention * 3 / 4) / (12 * (linear + attention + modulation))
    assert block_flops_saved(preset("S/2")) == pytest.approx(saved, rel=1e-12)


def test_a_model_without_routes_saves_nothing():
    model = preset("S/2", routes=None)
    assert (block_flops_saved(model), flop_ceiling(model)) == (0.0, 1.0)
    assert flop_ceiling(model, selection_ratio=0.5) == 1.0


@pytest.mark.parametrize("num_tokens, selection_ratio", [(0, None), (-4, 0.5), (256, 1.0), (256, -0.1)])
def test_impossible_arguments_are_refused(num_tokens, selection_ratio):
    with pytest.raises(ValueError, match="Expected"):
        forward_flops(preset("S/2"), num_tokens, selection_ratio=selection_ratio)
