# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""PathDropGuidance against its equation, written out with direct calls of the model."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_tread import PathDropGuidance, RoutingCall, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.flops import forward_flops, guidance_flops


@pytest.fixture
def make_transformer():
    """Makes models whose output depends on everything: at initialisation it would be 0."""

    def make(**settings):
        routes = [{"start": 2, "end": 3, "selection_ratio": 0.75, "rejoin": "fuse", "path_drop": 0.9}]
        defaults = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "in_channels": 2}
        defaults |= {"sample_size": 4, "patch_size": 1, "num_classes": 5, "routes": routes, "objective": "flow"}
        model = TREADTransformer2DModel(**(defaults | settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def make_pipeline(make_transformer):
    def make(guider, **settings):
        pipe = TREADPipeline(make_transformer(**settings), FlowMatchEulerDiscreteScheduler(), guider=guider)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def sampled(pipe, noise, labels):
    return pipe(labels, latents=noise, num_inference_steps=2, output_type="latent").images


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("null_weak_branch", [True, False])
def test_guided_sampling_is_the_equation_step_by_step(make_pipeline, null_weak_branch, training):
    """Also from a model in training mode, which drops the path of no sample at random then."""
    pipe = make_pipeline(PathDropGuidance(guidance_scale=1.7, null_weak_branch=null_weak_branch))
    noise, labels, ran = torch.randn(2, 2, 4, 4), [1, 3], []
    model = pipe.transformer
    hooks = [block.register_forward_hook(lambda block, *_: ran.append(block)) for block in model.transformer_blocks]
    model.train(training)
    found = sampled(pipe, noise, labels)
    assert [ran.count(block) for block in model.transformer_blocks] == [4 if null_weak_branch else 2] * 2 + [
        2, 2, 4, 4
    ]  # fmt: skip
    for hook in hooks:
        hook.remove()

    model.eval()
    latents, sigmas = noise, [*pipe.scheduler.sigmas.tolist()]
    condition = torch.tensor(labels)
    weak_condition = torch.full_like(condition, 5) if null_weak_branch else condition
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            time = torch.tensor(1000 * sigma)
            strong = model(latents, time, condition).sample
            weak = model(latents, time, weak_condition, routing=RoutingCall(path_drop=True)).sample
            assert (strong - weak).abs().max() > 0.05
            latents = latents + (following - sigma) * (1.7 * strong - 0.7 * weak)
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


def test_other_loops_get_the_same_branches(make_transformer):
    model, guider = make_transformer(), PathDropGuidance(guidance_scale=1.7, strong_ratio=0.5)
    latents, time, labels = torch.randn(2, 2, 4, 4), torch.tensor(300.0), torch.tensor([1, 3])
    guider.set_state(step=0, num_inference_steps=2, timestep=time)
    found = []
    for batch in guider.prepare_inputs({"class_labels": (labels, torch.full_like(labels, 5))}):
        guider.prepare_models(model)
        found.append(model(latents, time, class_labels=batch.class_labels, routing=RoutingCall(seed=3)).sample)
        guider.cleanup_models(model)
    strong = model(latents, time, labels, routing=RoutingCall(selection_ratio=0.5, seed=3)).sample
    weak = model(latents, time, torch.tensor([5, 5]), routing=RoutingCall(path_drop=True)).sample
    assert torch.equal(found[0], strong) and torch.equal(found[1], weak)


def test_the_weak_branch_costs_the_model_without_the_routes_blocks(make_transformer):
    model, shallow = make_transformer(), make_transformer(num_layers=4, routes=None)
    weak, dense = forward_flops(shallow), forward_flops(model, selection_ratio=0.0)
    fusion = 2 * 16 * 32 * 16  # 16 tokens, 32 channels in, 16 out
    found = guidance_flops(model, PathDropGuidance(guidance_scale=1.7, stop=0.5), num_steps=2)
    assert found.steps[0].total == dense.total + weak.total + fusion
    assert found.steps[1] == dense == found.dense

    # With the condition, the blocks in front of the route are those of the strong branch.
    two_blocks = forward_flops(make_transformer(routes=None)).total - weak.total
    found = guidance_flops(model, PathDropGuidance(guidance_scale=1.7, null_weak_branch=False), num_steps=1)
    assert found.total == dense.total + weak.total + fusion - two_blocks


def test_a_saved_pipeline_makes_the_same_images(make_pipeline, tmp_path):
    pipe, noise = make_pipeline(PathDropGuidance(guidance_scale=1.7, strong_ratio=0.0)), torch.randn(1, 2, 4, 4)
    pipe.save_pretrained(tmp_path)
    loaded = TREADPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.guider) is PathDropGuidance and loaded.guider.guidance_scale == 1.7
    assert torch.equal(sampled(loaded, noise, [2]), sampled(pipe, noise, [2]))


def test_models_without_a_fusion_and_bad_settings_are_refused(make_pipeline):
    pipe = make_pipeline(PathDropGuidance(), routes="default")
    with pytest.raises(ValueError, match="Expected a route with rejoin='fuse', whose path can be dropped"):
        sampled(pipe, torch.randn(1, 2, 4, 4), [2])
    pipe.guider = PathDropGuidance(enabled=False)
    sampled(pipe, torch.randn(1, 2, 4, 4), [2])
    for settings, message in [({"guidance_scale": -1.0}, "guidance_scale >= 0"), ({"strong_ratio": 1.0}, "in .0, 1.")]:
        with pytest.raises(ValueError, match=message):
            PathDropGuidance(**settings)
