# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""SparseGuidance against its equation, written out with direct calls of the model."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines import BlockState

from diffusers_tread import (
    RatioSchedule,
    RoutingCall,
    SparseGuidance,
    TokenRouter,
    TREADTransformer2DModel,
    get_token_router,
    token_routing,
)


NUM_CLASSES = 5


@pytest.fixture
def make_transformer():
    """Makes routed models whose output depends on everything: at initialisation it would be 0."""

    def make(**settings):
        defaults = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "in_channels": 2}
        defaults |= {"sample_size": 4, "patch_size": 1, "num_classes": NUM_CLASSES}
        model = TREADTransformer2DModel(**(defaults | settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def transformer(make_transformer):
    return make_transformer()


@pytest.fixture
def inputs():
    return torch.randn(3, 2, 4, 4), torch.tensor(0.3), torch.tensor([0, 1, 4])


def ratios_of(guider):
    """The ratio of each branch of the current step."""
    return [branch.selection_ratio for branch in guider.branches()]


def guided(guider, model, latents, timestep, labels, *, step=0, num_steps=10, seed=None, weak_model=None):
    """One step of any diffusers loop. Returns the guided prediction and the labels each branch was called with."""
    seen, models = [], [model, model if weak_model is None else weak_model]
    guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
    branches = guider.prepare_inputs({"class_labels": (labels, torch.full_like(labels, NUM_CLASSES))})
    for branch, denoiser in zip(branches, models, strict=False):
        guider.prepare_models(denoiser)
        with torch.no_grad(), token_routing(denoiser, seed=seed):
            branch.noise_pred = denoiser(latents, timestep, class_labels=branch.class_labels).sample
        guider.cleanup_models(denoiser)
        seen.append(branch.class_labels)
    return guider(branches).pred, seen


def predicted(model, latents, timestep, labels, *, ratio, seed):
    with torch.no_grad(), token_routing(model, selection_ratio=ratio, seed=seed):
        return model(latents, timestep, class_labels=labels).sample


@pytest.mark.parametrize("scale, strong_ratio, weak_ratio", [(1.4, 0.2, 0.8), (3.0, 0.0, 0.5), (0.5, 0.25, 0.75)])
def test_guided_prediction_is_the_papers_combination(transformer, inputs, scale, strong_ratio, weak_ratio):
    guider = SparseGuidance(guidance_scale=scale, strong_ratio=strong_ratio, weak_ratio=weak_ratio)
    prediction, _ = guided(guider, transformer, *inputs, seed=7)
    strong = predicted(transformer, *inputs, ratio=strong_ratio, seed=7)
    weak = predicted(transformer, *inputs, ratio=weak_ratio, seed=7)
    assert (strong - weak).abs().max() > 0.05  # else the comparison would hold for any combination
    torch.testing.assert_close(prediction, scale * strong + (1 - scale) * weak, atol=1e-5, rtol=1e-5)


def test_both_branches_have_the_condition(transformer, inputs):
    latents, timestep, labels = inputs
    _, seen = guided(SparseGuidance(), transformer, *inputs, seed=7)
    assert [label.tolist() for label in seen] == [[0, 1, 4], [0, 1, 4]]

    # The prediction of each branch changes with the label.
    for ratio in (0.2, 0.8):
        first = predicted(transformer, latents, timestep, labels, ratio=ratio, seed=7)
        second = predicted(transformer, latents, timestep, (labels + 1) % NUM_CLASSES, ratio=ratio, seed=7)
        assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_null_weak_branch_drops_the_condition_of_the_weak_branch_only(transformer, inputs):
    latents, timestep, labels = inputs
    guider = SparseGuidance(guidance_scale=2.5, null_weak_branch=True)
    prediction, seen = guided(guider, transformer, *inputs, seed=7)
    assert [label.tolist() for label in seen] == [[0, 1, 4], [NUM_CLASSES] * 3]
    strong = predicted(transformer, *inputs, ratio=0.2, seed=7)
    weak = predicted(transformer, latents, timestep, torch.full_like(labels, NUM_CLASSES), ratio=0.8, seed=7)
    torch.testing.assert_close(prediction, 2.5 * strong - 1.5 * weak, atol=1e-5, rtol=1e-5)


def test_outside_start_and_stop_there_is_one_dense_prediction(transformer, inputs):
    guider = SparseGuidance(start=0.2, stop=0.7)
    dense = predicted(transformer, *inputs, ratio=0.0, seed=0)
    for step in range(10):
        prediction, seen = guided(guider, transformer, *inputs, step=step, seed=step)
        within = 2 <= step < 7
        assert len(seen) == (2 if within else 1)
        assert torch.equal(prediction, dense) != within


@pytest.mark.parametrize("settings", [{"enabled": False}, {"start": 0.5}], ids=str)
def test_an_unguided_step_is_dense_even_where_the_model_would_route(transformer, inputs, settings):
    dense = predicted(transformer, *inputs, ratio=0.0, seed=0)
    transformer.train()
    prediction, seen = guided(SparseGuidance(**settings), transformer, *inputs, seed=7)
    assert torch.equal(prediction, dense) and len(seen) == 1


def test_scale_one_runs_the_strong_branch_alone(transformer, inputs):
    prediction, seen = guided(SparseGuidance(guidance_scale=1.0, strong_ratio=0.4), transformer, *inputs, seed=7)
    assert len(seen) == 1
    assert torch.equal(prediction, predicted(transformer, *inputs, ratio=0.4, seed=7))


def test_rescale_mixes_in_the_strong_branchs_deviation(transformer, inputs):
    plain, _ = guided(SparseGuidance(guidance_scale=3.0), transformer, *inputs, seed=7)
    rescaled, _ = guided(SparseGuidance(guidance_scale=3.0, guidance_rescale=0.7), transformer, *inputs, seed=7)
    strong = predicted(transformer, *inputs, ratio=0.2, seed=7)

    # arXiv 2305.08891, equations 15 and 16: per sample, over all other axes.
    for one, before, conditional in zip(rescaled.numpy(), plain.numpy(), strong.numpy(), strict=True):
        expected = before * (0.7 * conditional.std(ddof=1) / before.std(ddof=1) + 0.3)
        assert abs(one - expected).max() < 1e-5
        assert abs(one - before).max() > 0.05


def test_every_forward_draws_its_own_subset(transformer, inputs, monkeypatch):
    router, plan, plans = get_token_router(transformer), TokenRouter.plan, []
    monkeypatch.setattr(
        TokenRouter, "plan", lambda *args, **options: plans.append(plan(*args, **options)) or plans[-1]
    )
    router.defaults = RoutingCall(generator=torch.Generator().manual_seed(0))
    guider = SparseGuidance(strong_ratio=0.5, weak_ratio=0.55)  # 16 tokens: both keep 8
    for step in range(3):
        guided(guider, transformer, *inputs, step=step)
    subsets = {tuple(row.tolist()) for ids in plans for row in ids[0]}
    assert [list(ids[0].shape) for ids in plans] == [[3, 8]] * 6
    assert len(subsets) == 18  # 3 steps x 2 branches x 3 samples, all different


def test_the_router_is_as_before_after_each_branch(transformer, inputs):
    router = get_token_router(transformer)
    router.defaults = before = RoutingCall(enabled=False, selection_ratio=0.3)
    guided(SparseGuidance(), transformer, *inputs, seed=7)
    assert router.defaults == before


@pytest.fixture
def started(inputs):
    """A guider in its first step."""
    guider = SparseGuidance()
    guider.set_state(step=0, num_inference_steps=10, timestep=inputs[1])
    return guider


def test_a_branch_left_open_by_an_error_is_closed_by_the_next_step(transformer, inputs, started):
    guider, router = started, get_token_router(transformer)
    guider.prepare_models(transformer)  # and the forward failed
    assert router.resolve().selection_ratio == 0.2
    prediction, _ = guided(guider, transformer, *inputs, step=1, seed=7)
    assert not router.is_routing(training=False)
    assert torch.equal(prediction, guided(SparseGuidance(), transformer, *inputs, step=1, seed=7)[0])


def test_a_branch_that_outlives_what_surrounds_it_leaves_nothing_behind(transformer, started):
    guider, router = started, get_token_router(transformer)
    with token_routing(transformer, seed=7):
        guider.prepare_models(transformer)
    assert router.resolve().seed is None and router.is_routing(training=False)
    guider.cleanup_models(transformer)
    assert router.resolve().seed is None and not router.is_routing(training=False)


def test_threads_that_share_a_guider_take_back_what_they_set(transformer, inputs):
    guider, router = SparseGuidance(), get_token_router(transformer)
    guider.set_state(step=0, num_inference_steps=10, timestep=inputs[1])
    guider.prepare_models(transformer)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(guider.cleanup_models, transformer).result()
        pool.submit(guider.prepare_models, transformer).result()
        assert router.resolve().selection_ratio == 0.2  # the strong branch's, in both
        guider.cleanup_models(transformer)
        assert pool.submit(router.resolve).result().selection_ratio == 0.2
    assert router.resolve().selection_ratio is None


def test_a_bare_loop_needs_no_state(transformer, inputs):
    latents, timestep, labels = inputs
    guider, predictions = SparseGuidance(guidance_scale=1.4), []
    for _ in range(2):
        branches = guider.prepare_inputs({"class_labels": labels})
        with torch.no_grad(), token_routing(transformer, seed=7):
            for branch in branches:
                guider.prepare_models(transformer)
                branch.noise_pred = transformer(latents, timestep, class_labels=branch.class_labels).sample
                guider.cleanup_models(transformer)
        predictions.append(guider(branches)[0])
    expected, _ = guided(guider, transformer, *inputs, seed=7)
    assert torch.equal(predictions[0], expected) and torch.equal(predictions[1], expected)


@pytest.mark.parametrize("null_weak_branch", [False, True])
def test_modular_block_states_give_the_same_prediction(transformer, inputs, null_weak_branch):
    latents, timestep, labels = inputs
    guider = SparseGuidance(null_weak_branch=null_weak_branch)
    state = BlockState(latents=latents, labels=labels, null_labels=torch.full_like(labels, NUM_CLASSES))

    # As the denoising blocks of diffusers' modular pipelines do it.
    input_fields = {"class_labels": ("labels", "null_labels"), "hidden_states": "latents"}
    guider.set_state(step=0, num_inference_steps=10, timestep=timestep)
    guider_state = guider.prepare_inputs_from_block_state(state, input_fields)
    for branch in guider_state:
        guider.prepare_models(transformer)
        conditions = {name: getattr(branch, name) for name in input_fields}
        with torch.no_grad(), token_routing(transformer, seed=7):
            branch.noise_pred = transformer(timestep=timestep, **conditions, return_dict=False)[0]
        guider.cleanup_models(transformer)
    assert len(guider_state) == guider.num_conditions == 2
    assert torch.equal(guider(guider_state)[0], guided(guider, transformer, *inputs, seed=7)[0])


@pytest.mark.parametrize(
    "settings, shares", [({}, True), ({"null_weak_branch": True}, False), ({"weak_checkpoint": True}, False)], ids=str
)
def test_branches_of_one_denoiser_with_one_condition_share_their_inputs(settings, shares):
    strong, weak = SparseGuidance(**settings).branches()
    assert not strong.shares_prefix and weak.shares_prefix is shares


# Schedules.


@pytest.mark.parametrize(
    "shape, weak", [("cosine", [0.8, 0.71, 0.5, 0.29, 0.2]), ("linear", [0.8, 0.65, 0.5, 0.35, 0.2])]
)
def test_a_schedule_sets_the_ratio_of_each_step(transformer, inputs, shape, weak):
    # cos(pi / 4) = 0.7071: 0.8 - 0.6 * 0.1464 = 0.712.
    schedule = RatioSchedule(first=0.8, last=0.2, shape=shape)
    guider = SparseGuidance(guidance_scale=1.6, strong_ratio=0.1, weak_ratio=schedule)
    strong = predicted(transformer, *inputs, ratio=0.1, seed=7)
    for step, ratio in enumerate(weak):
        prediction, _ = guided(guider, transformer, *inputs, step=step, num_steps=5, seed=7)
        assert ratios_of(guider) == pytest.approx([0.1, ratio], abs=0.005)
        expected = 1.6 * strong - 0.6 * predicted(transformer, *inputs, ratio=ratio, seed=7)
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)


def test_a_schedule_needs_the_step_and_has_its_first_ratio_in_a_single_one(transformer, inputs):
    guider = SparseGuidance(strong_ratio=0.0, weak_ratio=RatioSchedule(first=0.8, last=0.2))
    with pytest.raises(ValueError, match="Call guider.set_state"):
        guider.prepare_inputs({"class_labels": torch.tensor([0])})
    assert not get_token_router(transformer).is_routing(training=False)
    guided(guider, transformer, *inputs, num_steps=1, seed=7)
    assert ratios_of(guider) == [0.0, 0.8]


# An earlier checkpoint as the weak branch.


@pytest.mark.parametrize("null_weak_branch", [False, True])
@pytest.mark.parametrize("strong_ratio, weak_ratio", [(0.0, 0.0), (0.0, 0.75), (0.5, 0.25)])
def test_a_checkpoint_predicts_the_weak_branch(
    make_transformer, transformer, inputs, strong_ratio, weak_ratio, null_weak_branch
):
    # Autoguidance, arXiv 2406.02507: both predictions have the condition.
    latents, timestep, labels = inputs
    earlier = make_transformer(num_attention_heads=1)
    settings = {"strong_ratio": strong_ratio, "weak_ratio": weak_ratio, "null_weak_branch": null_weak_branch}
    guider = SparseGuidance(guidance_scale=2.0, weak_checkpoint=True, **settings)
    routers = [get_token_router(model) for model in (transformer, earlier)]
    routers[1].defaults = RoutingCall(enabled=False)
    prediction, seen = guided(guider, transformer, *inputs, seed=7, weak_model=earlier)
    assert routers[0].defaults.enabled is None and routers[1].defaults.enabled is False

    weak_labels = torch.full_like(labels, NUM_CLASSES) if null_weak_branch else labels
    assert [label.tolist() for label in seen] == [labels.tolist(), weak_labels.tolist()]
    routers[1].defaults = RoutingCall(enabled=None)
    strong = predicted(transformer, *inputs, ratio=strong_ratio, seed=7)
    weak = predicted(earlier, latents, timestep, weak_labels, ratio=weak_ratio, seed=7)
    torch.testing.assert_close(prediction, 2.0 * strong - weak, atol=1e-5, rtol=1e-5)


def test_a_loop_that_forgets_the_checkpoint_is_told(transformer, inputs):
    guider = SparseGuidance(weak_checkpoint=True)
    with pytest.raises(ValueError, match="Expected another denoiser for the weak branch"):
        guided(guider, transformer, *inputs, seed=7)
    assert get_token_router(transformer).resolve().seed is None

    # Outside the interval there is no weak branch.
    guider = SparseGuidance(weak_checkpoint=True, start=0.5)
    assert len(guided(guider, transformer, *inputs, seed=7)[1]) == 1


def test_check_denoisers_names_what_is_missing(make_transformer, transformer):
    unrouted = make_transformer(routes=None)
    SparseGuidance().check_denoisers(transformer)
    SparseGuidance(enabled=False).check_denoisers(unrouted)
    SparseGuidance(enabled=False, weak_checkpoint=True).check_denoisers(transformer)
    with pytest.raises(ValueError, match="guidance_transformer=<an earlier checkpoint>"):
        SparseGuidance(weak_checkpoint=True).check_denoisers(transformer)

    # Routes are needed by the branch that uses them, at any step.
    rising = SparseGuidance(strong_ratio=RatioSchedule(first=0.0, last=0.6), weak_ratio=0.0, weak_checkpoint=True)
    rising.check_denoisers(transformer, unrouted)
    for denoisers in ((unrouted, transformer), (unrouted, unrouted)):
        with pytest.raises(ValueError, match="Expected a denoiser with token routes"):
            rising.check_denoisers(*denoisers)
    SparseGuidance(strong_ratio=0.0, weak_ratio=0.0, weak_checkpoint=True).check_denoisers(unrouted, unrouted)
    sparse = SparseGuidance(strong_ratio=0.0, weak_ratio=0.5, weak_checkpoint=True)
    sparse.check_denoisers(unrouted, transformer)
    with pytest.raises(ValueError, match="Expected a denoiser with token routes"):
        sparse.check_denoisers(transformer, unrouted)


def test_a_loop_whose_checkpoint_lacks_routes_is_told(make_transformer, transformer, inputs):
    guider, unrouted = SparseGuidance(weak_checkpoint=True, strong_ratio=0.0), make_transformer(routes=None)
    with pytest.raises(ValueError, match="Expected a denoiser with token routes"):
        guided(guider, transformer, *inputs, weak_model=unrouted)
    assert len(guided(guider, unrouted, *inputs, weak_model=transformer)[1]) == 2  # the dense branch needs none


# Presets.


def test_presets_have_the_papers_values():
    single = SparseGuidance.from_preset("single")
    assert single.guidance_scale == 1.4 and 0.05 <= single.strong_ratio <= 0.3 and 0.75 <= single.weak_ratio <= 0.85
    flops = SparseGuidance.from_preset("flops", guidance_scale=1.3, stop=0.7)
    assert (flops.guidance_scale, flops.strong_ratio, flops.weak_ratio, flops._stop) == (1.3, 0.5, 0.9, 0.7)
    fid = SparseGuidance.from_preset("fid", guidance_scale=1.3)
    assert fid.weak_checkpoint and not (single.weak_checkpoint or flops.weak_checkpoint)
    for step in range(40):
        fid.set_state(step=step, num_inference_steps=40, timestep=None)
        gamma = 0.3 + 0.3 * math.cos(math.pi * step / 39)
        assert ratios_of(fid) == pytest.approx([0.6 - gamma, gamma], abs=1e-12)


@pytest.mark.parametrize(
    "preset, message",
    [
        ("flops", "guidance_scale for the preset 'flops'.*does not print"),  # the paper does not
        ("fid", "guidance_scale for the preset 'fid'.*does not print"),
        ("best", r"preset among \['single', 'flops', 'fid'\], got 'best'"),
    ],
)
def test_unknown_presets_and_those_whose_scale_is_not_published_are_refused(preset, message):
    with pytest.raises(ValueError, match=message):
        SparseGuidance.from_preset(preset)


# Settings.


RISING, FALLING = RatioSchedule(first=0.0, last=0.6), RatioSchedule(first=0.6, last=0.0, shape="linear")


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.6, "strong_ratio": 0.1, "weak_ratio": 0.7, "null_weak_branch": True},
        {"guidance_scale": 2.0, "strong_ratio": RISING, "weak_ratio": FALLING, "weak_checkpoint": True},
    ],
    ids=["ratios", "schedules"],
)
def test_save_load_and_copies_keep_the_settings(tmp_path, settings):
    settings = settings | {"guidance_rescale": 0.5, "start": 0.1, "stop": 0.9, "enabled": False}
    as_json = {name: getattr(value, "to_dict", lambda value=value: value)() for name, value in settings.items()}
    guider = SparseGuidance(**settings)
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text())
    assert saved["_class_name"] == "SparseGuidance" and {name: saved[name] for name in settings} == as_json
    for other in (SparseGuidance.from_pretrained(tmp_path), guider.new(), copy.deepcopy(guider)):
        assert {name: other.config[name] for name in settings} == as_json
        assert (other.strong_ratio, other.weak_ratio) == (settings["strong_ratio"], settings["weak_ratio"])
    assert guider.new(weak_ratio=0.9).weak_ratio == 0.9 and "SparseGuidance" in repr(guider)


def test_a_diffusers_guiders_configuration_is_understood():
    guider = SparseGuidance.from_config(ClassifierFreeGuidance(guidance_scale=1.7, stop=0.8).config)
    assert (guider.guidance_scale, guider._stop, guider.weak_ratio) == (1.7, 0.8, 0.8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strong_ratio": 0.5, "weak_ratio": 0.5}, "weak_ratio > strong_ratio"),
        ({"strong_ratio": 0.8, "weak_ratio": 0.2}, "weak_ratio > strong_ratio"),
        ({"strong_ratio": RISING, "weak_ratio": FALLING}, "weak_ratio > strong_ratio"),
        ({"strong_ratio": RISING, "weak_ratio": RISING}, "weak_ratio > strong_ratio"),
        ({"strong_ratio": {"first": 0.1}, "weak_ratio": 0.5}, "mapping with the keys"),
        ({"weak_ratio": 1.0}, r"in \[0, 1\).*got 1.0"),
        ({"strong_ratio": -0.1}, r"in \[0, 1\).*got -0.1"),
        ({"strong_ratio": float("nan")}, r"in \[0, 1\).*got nan"),
        ({"guidance_scale": -1.0}, "guidance_scale >= 0"),
        ({"guidance_scale": float("inf")}, "finite guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale >= 0"),
        ({"guidance_rescale": 1.1}, "guidance_rescale"),
        ({"start": -0.1}, "start"),
        ({"start": 0.5, "stop": 0.4}, "stop"),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseGuidance(**settings)


def test_models_without_routes_are_refused(inputs):
    guider, latents = SparseGuidance(), torch.zeros(1, 2, 4, 4)
    unrouted = TREADTransformer2DModel(num_attention_heads=1, num_layers=2, in_channels=2, sample_size=4, routes=None)
    for model in (unrouted, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="Expected a denoiser with token rout"):
            guider.prepare_models(model)

    # Where there is nothing to guide, there is nothing to refuse.
    off = SparseGuidance(enabled=False)
    off.prepare_models(unrouted)
    assert unrouted(latents, torch.tensor(0.0)).sample.shape == latents.shape
    off.cleanup_models(unrouted)


def test_a_branch_too_few_is_refused(transformer, inputs):
    guider = SparseGuidance()
    branches = guider.prepare_inputs({"class_labels": inputs[2]})
    for branch in branches:
        branch.noise_pred = inputs[0]
    with pytest.raises(ValueError, match="Expected 2"):
        guider(branches[:1])
