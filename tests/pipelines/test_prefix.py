# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance runs what its branches share once, and the images keep their bits."""

import gc
import weakref
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
from packaging.version import Version
from pipeline_calls import latents_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_tread import EDMHeunScheduler, RatioSchedule, SparseGuidance, TREADTransformer2DModel, token_routing
from diffusers_tread.flops import forward_flops, guidance_flops


ROUTES = {
    "state": [{"start": 2, "end": 3}],
    "input": [{"start": 2, "end": 3, "rejoin": "input"}],
    "sum": [{"start": 2, "end": 3, "rejoin": "sum"}],
    "magnitude": [{"start": 2, "end": 3, "magnitude_mix": 0.5}],
    "two": [{"start": 1, "end": 2}, {"start": 4, "end": 4, "rejoin": "sum"}],
    "delayed": [{"start": 2, "end": 3, "rejoin_from": 1}],
}
SCHEDULERS = {
    "Heun": EDMHeunScheduler(),
    "Heun with churn": EDMHeunScheduler(s_churn=10.0),
    "flow": FlowMatchEulerDiscreteScheduler(),
}


class Unshared(SparseGuidance):
    """Both branches from the first block on."""

    def branches(self):
        return [replace(branch, shares_prefix=False) for branch in super().branches()]


class PlainTransformer(TREADTransformer2DModel):
    """A denoiser with a forward without `prefix`."""

    _supports_prefix = False

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True, *, routing=None):
        return super().forward(hidden_states, timestep, class_labels, return_dict=return_dict, routing=routing)


@pytest.fixture
def count_blocks():
    """Counts the runs of each block of a model."""

    def count(model):
        counts = [0] * len(model.transformer_blocks)
        for index, block in enumerate(model.transformer_blocks):
            block.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
        return counts

    return count


def both_ways(pipe, settings, generator):
    """The latents with the shared prefix and without."""
    images = []
    for guider in (SparseGuidance, Unshared):
        pipe.guider = guider(**settings)
        torch.manual_seed(7)
        images.append(latents_of(pipe, [1, 4], generator()))
    return images


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("strong_ratio", [0.0, 0.25])
def test_shared_images_have_the_bits_of_unshared_ones(
    make_pipeline, make_transformer, generators, scheduler, kind, strong_ratio
):
    objective = "flow" if scheduler == "flow" else "edm"
    transformer = make_transformer(routes=ROUTES[kind], num_layers=8, objective=objective)
    pipe = make_pipeline(SCHEDULERS[scheduler], transformer)
    settings = {"strong_ratio": strong_ratio, "weak_ratio": 0.75}
    shared, unshared = both_ways(pipe, settings, lambda: generators(0, 1))
    assert torch.equal(shared, unshared)
    assert not torch.equal(shared, latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=1.0))


@pytest.mark.parametrize("kind", ["one", "none", "seed"])
def test_the_subsets_are_drawn_as_before_from_every_source(make_pipeline, kind):
    pipe = make_pipeline()
    make = {"one": lambda: torch.Generator().manual_seed(3)}.get(kind, lambda: None)
    with token_routing(pipe.transformer, seed=torch.tensor([5, 6]) if kind == "seed" else None):
        shared, unshared = both_ways(pipe, {}, make)
    assert torch.equal(shared, unshared)


def test_images_equal_those_of_the_guiders_own_loop(make_pipeline, make_transformer):
    """A bare loop, in which nothing is shared, as an independent account of what the pipeline does."""
    transformer = make_transformer(routes=ROUTES["sum"], num_layers=8, objective="flow")
    pipe = make_pipeline(FlowMatchEulerDiscreteScheduler(), transformer)
    pipe.guider, seed = SparseGuidance(strong_ratio=0.25, weak_ratio=0.75), torch.tensor([5, 6])
    x = torch.randn(2, 3, 8, 8)
    with token_routing(pipe.transformer, seed=seed):
        images = latents_of(pipe, [1, 4], None, sigmas=[1.0, 0.5], latents=x)

    labels = torch.tensor([1, 4])
    for sigma, next_sigma in ((1.0, 0.5), (0.5, 0.0)):
        predictions = []
        for ratio in (0.25, 0.75):
            with torch.no_grad(), token_routing(pipe.transformer, selection_ratio=ratio, seed=seed):
                predictions.append(pipe.transformer(x, torch.tensor(1000 * sigma), labels).sample)
        x = x + (next_sigma - sigma) * torch.lerp(predictions[1], predictions[0], 1.4)
    assert torch.equal(images, x)


# When it is shared.


@pytest.mark.parametrize(
    "settings, first, others",
    [
        ({}, 5, 10),
        ({"null_weak_branch": True}, 10, 10),
        ({"weak_checkpoint": True}, 5, 5),  # the other model runs the other five
        ({"guidance_scale": 1.0}, 5, 5),
        ({"start": 0.2, "stop": 0.6}, 5, 7),  # calls 1 and 2 of 5
        ({"weak_ratio": RatioSchedule(first=0.8, last=0.2)}, 5, 10),
    ],
    ids=str,
)
def test_the_blocks_before_the_first_route_run_once_per_step(
    make_pipeline, make_transformer, count_blocks, settings, first, others
):
    pipe = make_pipeline(guider=SparseGuidance(**settings))
    pipe.guidance_transformer = make_transformer()
    counts, early_counts = count_blocks(pipe.transformer), count_blocks(pipe.guidance_transformer)
    pipe([1, 4], num_inference_steps=3)  # 5 model calls per branch
    assert counts == [first] * 2 + [others] * 4
    assert early_counts == [5 if "weak_checkpoint" in settings else 0] * 6


def test_a_transformer_that_knows_no_prefix_gives_the_same_images(make_pipeline, make_transformer, generators):
    transformer = make_transformer()
    plain = PlainTransformer.from_config(transformer.config).eval()
    plain.load_state_dict(transformer.state_dict())
    new, old = (make_pipeline(transformer=one, guider=SparseGuidance()) for one in (transformer, plain))
    assert torch.equal(latents_of(new, [1, 4], generators(0, 1)), latents_of(old, [1, 4], generators(0, 1)))


@pytest.mark.parametrize("kind", ["unshared", "leaf_level", "block_level"])
def test_a_guider_that_does_not_share_and_group_offloading_run_everything_twice(make_pipeline, count_blocks, kind):
    pipe = make_pipeline(guider=Unshared() if kind == "unshared" else SparseGuidance())
    if kind != "unshared":
        if Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available():
            pytest.skip("older diffusers (seen in 0.36) cannot make its group offloading hooks without an accelerator")
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type=kind, **options)
    counts = count_blocks(pipe.transformer)
    pipe(1, num_inference_steps=1)
    assert counts == [2] * 6


@pytest.mark.parametrize("kind", ["layerwise casting", "sequential offloading", "compilation"])
def test_other_hooks_and_compilation_share(make_pipeline, count_blocks, kind):
    pipe = make_pipeline(guider=SparseGuidance())
    counts = count_blocks(pipe.transformer)
    if kind == "layerwise casting":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    elif kind == "sequential offloading":
        pytest.importorskip("accelerate").cpu_offload(pipe.transformer, torch.device("cpu"))
    else:
        torch._dynamo.reset()
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe(1, num_inference_steps=1)
    assert counts == [1] * 2 + [2] * 4


def test_nothing_of_a_step_is_kept(make_pipeline):
    pipe, alive, prefixes = make_pipeline(guider=SparseGuidance()), [], []

    def remember(module, args, settings, output):
        prefixes.append(weakref.ref(output[-1] if settings.get("return_prefix") else settings["prefix"]))

    def callback(*_):
        gc.collect()
        alive.append([reference() is not None for reference in prefixes])

    pipe.transformer.register_forward_hook(remember, with_kwargs=True)
    pipe(1, num_inference_steps=2, callback_on_step_end=callback)
    assert alive == [[False] * 2, [False] * 4, [False] * 6]


# What it costs.


@pytest.mark.parametrize(
    "guider",
    [
        SparseGuidance(strong_ratio=0.25, weak_ratio=0.75),
        SparseGuidance(strong_ratio=0.0, weak_ratio=RatioSchedule(first=0.8, last=0.4), start=0.2, stop=0.8),
        SparseGuidance(strong_ratio=0.25, weak_ratio=0.75, null_weak_branch=True),
        ClassifierFreeGuidance(),
    ],
    ids=["SG", "a schedule in an interval", "CFG + SG", "CFG"],
)
def test_a_whole_call_has_the_flops_that_guidance_flops_counts(make_pipeline, make_transformer, guider):
    pipe = make_pipeline(transformer=make_transformer(routes=ROUTES["two"], num_layers=8), guider=guider)
    # Attention as matrix products: not every torch release counts the fused kernels.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pipe(1, num_inference_steps=3, output_type="latent")
    assert counter.get_total_flops() == guidance_flops(pipe.transformer, guider, num_steps=5).total
    assert guidance_flops(pipe.transformer, guider, num_steps=5).dense == forward_flops(
        pipe.transformer, selection_ratio=0.0
    )
