# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What is counted without data, against the formula of a DiT, forwards with data, and the papers' figures."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiTTransformer2DModel, FirstBlockCacheConfig, SD3Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_tread import (
    RatioSchedule,
    SparseGuidance,
    TokenRoute,
    TokenRouter,
    TREADTransformer2DModel,
    apply_token_routing,
    get_token_router,
    token_routing,
)
from diffusers_tread.flops import (
    Flops,
    _stacks,
    block_flops_saved,
    flop_ceiling,
    forward_flops,
    guidance_flops,
    training_flops,
)
from diffusers_tread.models.transformer_tread_2d import TREADTransformerBlock
from diffusers_tread.routing import RoutedStack, num_kept_tokens


def preset(name, **settings):
    """A model without memory: the counters look at shapes only."""
    with torch.device("meta"):
        return TREADTransformer2DModel.from_preset(name, **settings)


def formula(model, selection_ratio=None):
    """The FLOPs of one forward, layer by layer from the sizes: a multiply-add is two."""
    config = model.config
    width, patch_area = config.num_attention_heads * config.attention_head_dim, config.patch_size**2
    channels = config.in_channels + (config.out_channels or config.in_channels)
    num_tokens = (config.sample_size // config.patch_size) ** 2
    tokens = [num_tokens] * config.num_layers
    for route in get_token_router(model).routes:
        ratio = route.selection_ratio if selection_ratio is None else selection_ratio
        for index in range(route.start, route.end + 1):
            tokens[index] = num_kept_tokens(num_tokens, ratio)

    # Outside the blocks patches in and out, the time's two layers, the last modulation; in each block per token query,
    # key, value, output and feed-forward, per sample the modulation, per pair of tokens the two products of attention.
    linear = 2 * num_tokens * patch_area * channels * width + 2 * (256 + width) * width + 2 * width * 2 * width
    attention = 0
    for count in tokens:
        per_token = 2 * (4 * width + 2 * int(config.mlp_ratio * width)) * width
        linear += count * per_token + 2 * 6 * width * width
        attention += 2 * 2 * count**2 * width
    return Flops(linear=linear, attention=attention)


@pytest.mark.parametrize("name", ["S/2", "B/4", "XL/2"])
@pytest.mark.parametrize("selection_ratio", [None, 0.0, 0.9])
def test_a_forward_has_the_flops_of_the_formula(name, selection_ratio):
    model = preset(name)
    assert forward_flops(model, selection_ratio=selection_ratio) == formula(model, selection_ratio)


def test_a_forward_has_the_flops_of_the_formula_with_odd_settings_and_two_routes():
    routes = [
        TokenRoute(start=1, end=2, selection_ratio=0.3),
        TokenRoute(start=4, end=5, selection_ratio=0.7, rejoin_from=3),
    ]
    model = TREADTransformer2DModel(
        num_attention_heads=3, attention_head_dim=20, num_layers=9, in_channels=3, out_channels=5, sample_size=12,
        patch_size=3, num_classes=0, mlp_ratio=2.5, routes=routes,
    )  # fmt: skip
    assert forward_flops(model) == formula(model)
    larger = TREADTransformer2DModel.from_config(model.config, sample_size=15)
    inputs = {"hidden_states": torch.zeros(1, 3, 15, 15), "timestep": torch.zeros(1)}
    assert forward_flops(model, inputs) == formula(larger)


@pytest.mark.parametrize("name", ["S/2", "B/4"])
@pytest.mark.parametrize("selection_ratio", [0.0, 0.5])
def test_a_training_step_has_three_times_the_flops_of_a_forward_but_for_the_first_layers(name, selection_ratio):
    # Each product has two in the backward, one per factor; latents and times need no gradient.
    model = preset(name)
    width, patch_area = model.config.num_attention_heads * 64, model.config.patch_size**2
    num_tokens = (32 // model.config.patch_size) ** 2
    first_layers = 2 * (num_tokens * patch_area * 4 + 256) * width
    expected = 3 * formula(model, selection_ratio).total - first_layers
    assert training_flops(model, selection_ratio=selection_ratio) == expected


@pytest.mark.parametrize(
    "name, num_tokens, ceiling",
    [("S/2", 256, 1.43), ("B/2", 256, 1.43), ("L/2", 256, 1.67)]
    + [("XL/2", 256, 1.72), ("XL/2", 1024, 1.78), ("XL/2", 4096, 1.95)],
)
def test_the_ceilings_are_those_known_for_the_paper_s_models(name, num_tokens, ceiling):
    # Known to two decimals, some rounded and some cut off.
    model = preset(name, sample_size=2 * int(num_tokens**0.5))
    assert flop_ceiling(model) == pytest.approx(ceiling, abs=0.0101)


def test_counting_leaves_the_model_as_it_is():
    model = TREADTransformer2DModel(num_layers=6, sample_size=8)
    before, state = dict(vars(model)), {name: value.clone() for name, value in model.state_dict().items()}
    training_flops(model)
    block_flops_saved(model)
    assert vars(model) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Models that are not ours.


def counted_with_data(model, inputs, **routing):
    """What torch counts in a forward that computes."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, token_routing(model, **routing):
        model(**inputs)
    return counter.get_total_flops()


def hooked_dit():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=8, sample_size=16)
    labels = torch.tensor([3])
    return model, {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([5]), "class_labels": labels}


def hooked_sd3():
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=8, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 5, 8)}
    return model, inputs | {"pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([5.0])}


@pytest.mark.parametrize("make", [hooked_dit, hooked_sd3])
@pytest.mark.parametrize("selection_ratio", [None, 0.0, 0.75])
def test_a_hooked_model_has_the_flops_of_a_forward_with_data(make, selection_ratio):
    model, inputs = make()
    apply_token_routing(model, TokenRoute(start=2, end=-4))
    expected = counted_with_data(model.eval(), inputs, enabled=True, selection_ratio=selection_ratio)
    assert forward_flops(model, inputs, selection_ratio=selection_ratio).total == expected
    assert not any(parameter.is_meta for parameter in model.parameters())
    if selection_ratio is None:
        assert 0.1 < block_flops_saved(model, inputs) < 0.5 and flop_ceiling(model, inputs) > 1.1


def test_models_of_others_want_inputs():
    model, _ = hooked_sd3()
    apply_token_routing(model, TokenRoute(start=2, end=-4))
    with pytest.raises(ValueError, match="Expected `inputs`.*SD3Transformer2DModel"):
        forward_flops(model)


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
    counted = [[formula(model, ratio) for ratio in step] for step in ratios]
    assert list(flops.steps) == [sum(step[1:], step[0]) for step in counted]
    cfg = 5 * 2 * counted[0][0].total
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
    alone = ({"null_weak_branch": True}, {"weak_checkpoint": True}, {"guidance_scale": 1.0})
    for other in (*(SparseGuidance(**settings) for settings in alone), ClassifierFreeGuidance()):
        assert guidance_flops(model, other) == guidance_flops(model, other, shared_prefix=False)


def test_the_weak_branch_counts_with_its_own_model():
    main, weak = preset("B/2"), preset("S/2", sample_size=16)
    guider = SparseGuidance(strong_ratio=0.0, weak_ratio=0.75, weak_checkpoint=True)
    branches = [forward_flops(model, selection_ratio=ratio).total for model, ratio in ((main, 0.0), (weak, 0.75))]
    assert guidance_flops(main, guider, num_steps=1, guidance_model=weak).total == sum(branches)
    same_size = forward_flops(main, selection_ratio=0.75).total
    assert guidance_flops(main, guider, num_steps=1).total == branches[0] + same_size
    alone = SparseGuidance(guidance_scale=1.0, strong_ratio=0.0)
    assert guidance_flops(main, alone, num_steps=1, guidance_model=weak).total == branches[0]


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


class WithoutPrefix(TREADTransformer2DModel):
    _supports_prefix = False

    def forward(self, hidden_states, timestep, class_labels=None, *, routing=None):
        return super().forward(hidden_states, timestep, class_labels, routing=routing)


def test_branches_of_a_model_without_a_prefix_count_in_full():
    with torch.device("meta"):
        model = WithoutPrefix(num_layers=6)
    expected = guidance_flops(TREADTransformer2DModel(num_layers=6), SparseGuidance(), shared_prefix=False)
    assert guidance_flops(model, SparseGuidance()) == expected


def test_arguments_of_blocks_need_not_be_tensors(monkeypatch):
    expected, block, stack = forward_flops(preset("S/2")), TREADTransformerBlock.forward, RoutedStack.forward
    monkeypatch.setattr(TREADTransformerBlock, "forward", lambda self, *args: block(self, *args[:2]))
    monkeypatch.setattr(RoutedStack, "forward", lambda self, *args, **kw: stack(self, *args, None, [2], **kw))
    assert forward_flops(preset("S/2")) == expected


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_count(wrapped):
    peft = pytest.importorskip("peft")
    model, config = preset("S/2"), peft.LoraConfig(r=2, target_modules=["to_qkv"])
    plain = forward_flops(model, selection_ratio=0.0).linear
    adapted = peft.get_peft_model(model, config) if wrapped else model
    if not wrapped:
        model.add_adapter(config)
    assert forward_flops(adapted, selection_ratio=0.0).linear - plain == 12 * 2 * 256 * 2 * (384 + 3 * 384)


def test_what_others_hooked_on_and_the_dtype_do_not_count():
    model = TREADTransformer2DModel(num_layers=6, sample_size=8)
    expected = forward_flops(model, selection_ratio=0.0)
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    assert forward_flops(model.to(torch.bfloat16), selection_ratio=0.0) == expected


def test_a_dense_model_of_others_is_counted():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=6)
    inputs = {
        "hidden_states": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor([1]),
        "class_labels": torch.tensor([0]),
    }
    dense = forward_flops(model, inputs)
    with pytest.raises(ValueError, match="Expected a denoiser with token routing"):
        forward_flops(model, inputs, selection_ratio=0.5)
    apply_token_routing(model, TokenRoute(start=1, end=2))
    assert forward_flops(model, inputs, selection_ratio=0.0) == dense


def test_stacks_in_a_dict_of_modules_are_stacks():
    model = torch.nn.Module()
    model.modes = torch.nn.ModuleDict({"image": torch.nn.ModuleList([torch.nn.Linear(1, 1)])})
    assert [*_stacks(model)] == [model.modes["image"]]


class Repeated(torch.nn.Linear):
    """Works as often as an attribute says."""

    def __init__(self, repeats):
        super().__init__(4, 4)
        self.repeats = repeats

    def forward(self, tokens):
        for _ in range(self.repeats):
            tokens = super().forward(tokens)
        return tokens


def test_blocks_that_work_differently_count_differently_wherever_their_stack_is():
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token_router = TokenRouter(TokenRoute(start=1, end=1, selection_ratio=0.5), num_layers=4)
            self.core = torch.nn.Module()
            self.core.blocks = RoutedStack([Repeated(repeats) for repeats in (1, 5, 1, 1)])

        def forward(self, tokens, routing):
            plan = self.token_router.plan(tokens, training=False, call=routing)
            return self.core.blocks(tokens, routes=self.token_router.routes, kept_token_ids=plan)

    inputs = {"tokens": torch.zeros(1, 8, 4)}
    assert forward_flops(Nested(), inputs, selection_ratio=0.0).linear == 8 * 8 * 2 * 4 * 4
    assert block_flops_saved(Nested(), inputs) == pytest.approx(2.5 / 8)


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


@pytest.mark.parametrize("selection_ratio", [1.0, -0.1])
def test_impossible_ratios_are_refused(selection_ratio):
    with pytest.raises(ValueError, match="Expected a selection ratio"):
        forward_flops(preset("S/2"), selection_ratio=selection_ratio)


def test_the_dtypes_of_inputs_and_weights_do_not_count():
    """Text encoders in bfloat16 under autocast, frozen weights of a LoRA."""
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 16).bfloat16()}
    inputs |= {"pooled_projections": torch.randn(1, 16).bfloat16(), "timestep": torch.tensor([100.0])}
    flops = training_flops(transformer, inputs)
    assert flops > 0 and training_flops(transformer.bfloat16(), inputs) == flops
