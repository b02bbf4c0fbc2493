# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance in pipelines that take no guider, against loops written by hand."""

import copy
import threading

import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler

from diffusers_tread import (
    FlowSDEScheduler,
    GuidedPipeline,
    PathDropGuidance,
    RatioSchedule,
    SparseGuidance,
    TokenRoute,
    apply_token_routing,
    get_token_router,
    token_routing,
)
from diffusers_tread.pipelines import guided_pipeline
from diffusers_tread.pipelines.noise_levels import steps_inside
from diffusers_tread.routing import draw_routing_seed


pytest.importorskip("transformers")

from tiny_pipelines import PIPELINES  # noqa: E402


PROMPTS, NEGATIVE = ["a red", "blue square"], "a"
STEPS, SCALE = 3, 1.6
SETTINGS = {
    "sd3": {"max_sequence_length": 8, "height": 16, "width": 16},
    "flux": {"max_sequence_length": 8, "height": 16, "width": 16},
    "prx": {"use_resolution_binning": False, "height": 16, "width": 16},
}
SHAPES = {"sd3": (4, 8, 8), "flux": (16, 16), "prx": (4, 8, 8)}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def pipeline(request, tmp_path_factory):
    torch.manual_seed(0)
    pipeline = PIPELINES[request.param](tmp_path_factory.mktemp(request.param))
    pipeline.name = request.param
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # T5 drops out
    with torch.no_grad():  # some gates start at zero
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    apply_token_routing(pipeline.transformer, TokenRoute(start=2, end=-4))
    return pipeline


def sample(call, name, prompts=PROMPTS, **settings):
    """Latents of a pipeline or a guided one."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(len(prompts), *SHAPES[name], generator=generator)
    settings = {"num_inference_steps": STEPS, "output_type": "latent"} | SETTINGS[name] | settings
    return call(prompts, latents=latents, generator=generator, **settings).images


def forward_of(pipeline, prompts, transformer=None):
    """velocity(latents, t) of the transformer for some prompts, as the pipeline calls it without guidance."""
    transformer, name = transformer or pipeline.transformer, pipeline.name
    if name == "sd3":
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
        )
        return lambda latents, t: transformer(latents, embeds, pooled, t.expand(len(latents))).sample
    if name == "flux":
        embeds, pooled, text_ids = pipeline.encode_prompt(prompts, None, max_sequence_length=8)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        return lambda latents, t: (
            transformer(
                latents, embeds, pooled, t.expand(len(latents)) / 1000, ids, text_ids, torch.full([len(latents)], 3.5)
            ).sample
        )
    embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return lambda latents, t: transformer(latents, t.view(1) / 1000, embeds, attention_mask=mask).sample


@torch.no_grad()
def sample_by_hand(pipeline, prompts, *, ratios, negative=None, guided_steps=range(STEPS), weak_transformer=None):
    """As `sample`; `ratios(step)` are those of the strong and the weak branch."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(len(prompts), *SHAPES[pipeline.name], generator=generator)
    given = forward_of(pipeline, prompts)
    other = forward_of(pipeline, prompts if negative is None else [negative] * len(prompts), weak_transformer)
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = [1, 2 / 3, 1 / 3] if pipeline.name == "flux" else None  # the pipeline's own
    scheduler.set_timesteps(None if sigmas else STEPS, sigmas=sigmas)
    for step, t in enumerate(scheduler.timesteps):
        is_guided, predictions = step in guided_steps, []
        for forward, ratio in zip((given, other), ratios(step), strict=True):
            ratio = ratio if is_guided else 0.0
            seed = draw_routing_seed(generator) if ratio > 0 else None
            with token_routing(pipeline.transformer, selection_ratio=ratio, seed=seed):
                predictions.append(forward(latents, t))
        strong, weak = predictions
        velocity = weak + SCALE * (strong - weak) if is_guided else strong
        latents = scheduler.step(velocity, t, latents).prev_sample
    return latents


def with_negative(name, prompts):
    return {"negative_prompt": NEGATIVE if name == "prx" else [NEGATIVE] * len(prompts)}


def test_sparse_guidance_equals_a_loop_by_hand_and_leaves_the_pipeline_as_it_was(pipeline):
    off = {} if pipeline.name == "flux" else {"guidance_scale": 1.0}
    plain = sample(pipeline, pipeline.name, **off)
    guided = GuidedPipeline(pipeline, SparseGuidance(guidance_scale=SCALE, strong_ratio=0.25, weak_ratio=0.75))
    expected = sample_by_hand(pipeline, PROMPTS, ratios=lambda step: (0.25, 0.75))
    torch.testing.assert_close(sample(guided, pipeline.name), expected, atol=1e-5, rtol=1e-5)

    assert "step" not in vars(pipeline.scheduler) and not get_token_router(pipeline.transformer).is_routing(False)
    assert torch.equal(sample(pipeline, pipeline.name, **off), plain)
    assert (plain - expected).abs().max() > 1e-3


def test_classifier_free_and_sparse_guidance_equal_a_loop_by_hand(pipeline):
    prompts = PROMPTS[: 1 if pipeline.name == "prx" else 2]  # PRX's own classifier-free guidance takes one prompt
    strong, weak = RatioSchedule(first=0.0, last=0.25), RatioSchedule(first=0.75, last=0.5, shape="linear")
    guider = SparseGuidance(SCALE, strong, weak, null_weak_branch=True)
    expected = sample_by_hand(
        pipeline, prompts, negative=NEGATIVE, ratios=lambda step: (strong.at(step / 2), weak.at(step / 2))
    )
    actual = sample(GuidedPipeline(pipeline, guider), pipeline.name, prompts, **with_negative(pipeline.name, prompts))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_an_image_depends_on_its_own_generator_alone(pipeline):
    null = pipeline.name != "prx"  # whose classifier-free guidance takes one image
    guided = GuidedPipeline(pipeline, SparseGuidance(SCALE, 0.25, 0.75, null_weak_branch=null))
    prompt = PROMPTS[:1]
    settings = {"num_inference_steps": 2, "output_type": "latent"} | SETTINGS[pipeline.name]
    settings |= with_negative(pipeline.name, prompt) if null else {}

    def latents(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return guided(prompt, num_images_per_prompt=len(seeds), generator=generators, **settings).images

    torch.testing.assert_close(latents([1, 2])[1:], latents([2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_an_image_of_an_sde_depends_on_its_own_generator_alone(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", FlowSDEScheduler.from_config(pipeline.scheduler.config))
    test_an_image_depends_on_its_own_generator_alone(pipeline)


@pytest.mark.parametrize("null", [False, True])
def test_outside_the_interval_there_is_the_dense_prediction_with_the_prompt(pipeline, null):
    prompts = PROMPTS[:1]
    guider = SparseGuidance(SCALE, 0.25, 0.75, null_weak_branch=null, start=0.34, stop=0.67)
    expected = sample_by_hand(
        pipeline, prompts, negative=NEGATIVE if null else None, ratios=lambda step: (0.25, 0.75), guided_steps=[1]
    )
    negative = with_negative(pipeline.name, prompts) if null else {}
    actual = sample(GuidedPipeline(pipeline, guider), pipeline.name, prompts, **negative)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pipeline", ["sd3"], indirect=True)
def test_an_interval_of_levels_is_found_once_per_call(pipeline, monkeypatch):
    by_share = GuidedPipeline(pipeline, SparseGuidance(SCALE, 0.25, 0.75, start=0.34, stop=0.67))
    expected = sample(by_share, pipeline.name, PROMPTS[:1])
    levels, found = pipeline.scheduler.sigmas.tolist(), []
    monkeypatch.setattr(
        guided_pipeline, "steps_inside", lambda *given: found.append(steps_inside(*given)) or found[-1]
    )
    guided = GuidedPipeline(pipeline, SparseGuidance(SCALE, 0.25, 0.75), guidance_interval=(levels[2], levels[1]))
    torch.testing.assert_close(sample(guided, pipeline.name, PROMPTS[:1]), expected)
    assert found == [[1]]


def test_an_earlier_checkpoint_runs_the_weak_branch(pipeline):
    earlier = copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.mul_(0.9)
    guided = GuidedPipeline(
        pipeline, SparseGuidance(SCALE, 0.0, 0.0, weak_checkpoint=True), guidance_transformer=earlier
    )
    expected = sample_by_hand(pipeline, PROMPTS, ratios=lambda step: (0.0, 0.0), weak_transformer=earlier)
    torch.testing.assert_close(sample(guided, pipeline.name), expected, atol=1e-5, rtol=1e-5)


def test_ratios_that_route_no_token_give_the_pipelines_own_guidance(pipeline):
    scale = "true_cfg_scale" if pipeline.name == "flux" else "guidance_scale"
    negative = with_negative(pipeline.name, PROMPTS[:1])
    plain = sample(pipeline, pipeline.name, PROMPTS[:1], **{scale: SCALE}, **negative)
    guider = SparseGuidance(SCALE, 0.0, 0.01, null_weak_branch=True)
    actual = sample(GuidedPipeline(pipeline, guider), pipeline.name, PROMPTS[:1], **negative)
    torch.testing.assert_close(actual, plain, atol=1e-5, rtol=1e-5)


def test_an_error_and_another_thread_see_the_transformer_as_it_was(pipeline):
    transformer = pipeline.transformer
    forward, velocity = vars(transformer)["forward"], forward_of(pipeline, PROMPTS)
    latents, t = torch.randn(2, *SHAPES[pipeline.name]), torch.tensor(500.0)
    with torch.no_grad():
        dense, elsewhere = velocity(latents, t), []

    @torch.no_grad()
    def stop(*_):
        thread = threading.Thread(target=lambda: elsewhere.append(velocity(latents, t).detach()))
        thread.start()
        thread.join()
        raise KeyError("stop")

    guided = GuidedPipeline(pipeline, SparseGuidance(SCALE, 0.25, 0.75))
    with pytest.raises(KeyError, match="stop"):
        sample(guided, pipeline.name, callback_on_step_end=stop)
    assert torch.equal(elsewhere[0], dense)
    assert vars(transformer)["forward"] is forward and "step" not in vars(pipeline.scheduler)


def test_what_cannot_be_guided_is_refused_with_the_reason(pipeline):
    sparse, both = SparseGuidance(SCALE, 0.25, 0.75), SparseGuidance(SCALE, 0.25, 0.75, null_weak_branch=True)
    for guider, message in [
        (ClassifierFreeGuidance(), "Expected a SparseGuidance"),
        (PathDropGuidance(), "Expected a SparseGuidance for .*, got PathDropGuidance"),
        (SparseGuidance(0.5, 0.25, 0.75, null_weak_branch=True), "guidance_scale >= 1"),
        (SparseGuidance(2.0, 0.25, 0.75, weak_checkpoint=True), "Expected a second denoiser"),
    ]:
        with pytest.raises(ValueError, match=message):
            GuidedPipeline(pipeline, guider)
    scale = "true_cfg_scale" if pipeline.name == "flux" else "guidance_scale"
    with pytest.raises(ValueError, match=f"Expected no {scale} in the call, got 3.0"):
        sample(GuidedPipeline(pipeline, sparse), pipeline.name, **{scale: 3.0})
    if pipeline.name == "flux":
        with pytest.raises(ValueError, match="Expected 2 calls .* got 1.*negative_prompt"):
            sample(GuidedPipeline(pipeline, both), pipeline.name)
    if pipeline.name == "sd3":
        with pytest.raises(ValueError, match="Expected 1 calls .* got 2.*skipped layers"):
            sample(GuidedPipeline(pipeline, both), pipeline.name, skip_guidance_layers=[0], skip_layer_guidance_stop=1)
