# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What `TREADPipeline` computes: seeds, schedulers, decoding, state. Guidance has its own file."""

import diffusers
import numpy as np
import pytest
import torch
from closeness import difference, rounding
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from packaging.version import Version
from pipeline_calls import latents_of

from diffusers_tread import (
    EDMHeunScheduler,
    FlowSDEScheduler,
    RoutingCall,
    SparseGuidance,
    TokenRoute,
    get_token_router,
    token_routing,
)


FLOW_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
EDM_SCHEDULERS = [
    EDMHeunScheduler(),
    EDMHeunScheduler(s_churn=10.0),
    EDMEulerScheduler(),
    EDMDPMSolverMultistepScheduler(),
]
FLOW_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(),
    UniPCMultistepScheduler(**FLOW_SOLVER),
    DPMSolverMultistepScheduler(**FLOW_SOLVER),
    FlowSDEScheduler(),
]


# Seeds: each image depends on its own generator alone.


@pytest.mark.parametrize(
    "scheduler", [*EDM_SCHEDULERS, *FLOW_SCHEDULERS[:3], FlowSDEScheduler()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("guidance", ["dense", "cfg", "sparse"])
def test_an_image_does_not_depend_on_its_batch(make_pipeline, record_calls, generators, scheduler, guidance):
    pipe = make_pipeline(scheduler, guider=SparseGuidance() if guidance == "sparse" else None)
    settings = {"guidance_scale": 2.0} if guidance == "cfg" else {}
    _, plans = record_calls(pipe.transformer)
    batch = latents_of(pipe, [1, 4, 0], generators(10, 11, 12), **settings)
    batch_plans = plans.copy()
    plans.clear()
    alone = latents_of(pipe, [4], generators(11), **settings)
    # Up to rounding, which steps from a sigma of 80 make larger: products of another batch sum in another order.
    torch.testing.assert_close(batch[1:2], alone, atol=1e-3, rtol=1e-3)

    # The subsets are the same to the bit.
    if guidance == "sparse":
        assert len(plans) == len(batch_plans) > 0
        assert all(torch.equal(many[0][1:2], one[0]) for many, one in zip(batch_plans, plans, strict=True))


def test_a_router_switched_on_keeps_classifier_free_guidance_batch_invariant(make_pipeline, generators):
    pipe = make_pipeline()
    with token_routing(pipe.transformer, selection_ratio=0.5):
        batch = latents_of(pipe, [1, 4], generators(10, 11), guidance_scale=2.0)
        alone = latents_of(pipe, [4], generators(11), guidance_scale=2.0)
    assert difference(batch[1:2], alone) < rounding(5 * 6 * 160)  # five calls of six blocks of width 16
    assert (latents_of(pipe, [4], generators(11), guidance_scale=2.0) - alone).abs().max() > 0.01


@pytest.mark.parametrize("guider", [None, SparseGuidance()])
def test_same_seeds_give_the_same_images(make_pipeline, generators, guider):
    pipe = make_pipeline(EDMHeunScheduler(s_churn=10.0), guider=guider)
    first, second, other = (latents_of(pipe, [1, 4], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.manual_seed(5)
    first = latents_of(pipe, [1, 4], None)
    torch.manual_seed(5)
    assert torch.equal(latents_of(pipe, [1, 4], None), first)


def test_latents_are_the_noise_that_a_generator_would_give(make_pipeline, generators):
    pipe = make_pipeline()
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators(0, 1)])
    assert torch.equal(latents_of(pipe, [1, 4], None, latents=noise), latents_of(pipe, [1, 4], generators(0, 1)))


def test_the_first_model_input_is_scaled_noise(make_pipeline, record_calls):
    # EDM: c_in * sigma_max * noise, c_in = 1 / sqrt(sigma_max^2 + sigma_data^2), at ln(sigma_max) / 4.
    pipe, noise = make_pipeline(), torch.randn(1, 3, 8, 8)
    calls, _ = record_calls(pipe.transformer)
    latents_of(pipe, [1], None, latents=noise)
    torch.testing.assert_close(calls[0][0], noise * 80.0 / (80.0**2 + 0.5**2) ** 0.5)
    assert abs(calls[0][1].item() - np.log(80.0) / 4) < 1e-6


def test_images_of_a_label_lie_side_by_side(make_pipeline, generators):
    pipe = make_pipeline(guider=SparseGuidance())
    batch = latents_of(pipe, [1, 4], generators(0, 1, 2, 3), num_images_per_prompt=2)
    expected = latents_of(pipe, [1, 1, 4, 4], generators(0, 1, 2, 3))
    assert torch.equal(batch, expected)


# Schedulers.


@pytest.mark.parametrize("scheduler", EDM_SCHEDULERS + FLOW_SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_every_matching_scheduler_samples_twice_the_same(make_transformer, make_pipeline, generators, scheduler):
    objective = "edm" if scheduler in EDM_SCHEDULERS else "flow"
    pipe = make_pipeline(scheduler, make_transformer(objective=objective), guider=SparseGuidance())
    first = latents_of(pipe, [1, 4], generators(0, 1), num_inference_steps=4)
    assert first.shape == (2, 3, 8, 8) and first.dtype == torch.float32 and first.isfinite().all()
    assert torch.equal(latents_of(pipe, [1, 4], generators(0, 1), num_inference_steps=4), first)


def test_solvers_of_one_ode_agree(make_transformer, make_pipeline, generators):
    # A gentle field, so that few steps suffice: the solvers approach the same image.
    transformer = make_transformer(objective="flow")
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.1)
    images = [
        latents_of(make_pipeline(scheduler, transformer), [1, 4], generators(0, 1), num_inference_steps=100)
        for scheduler in (FLOW_SCHEDULERS[0], FLOW_SCHEDULERS[2], FLOW_SCHEDULERS[4])
    ]
    assert images[0].std() > 0.3
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], atol=0.03, rtol=0)


# Sizes and decoding.


def test_height_and_width_need_not_be_equal(make_pipeline, make_vae, generators):
    pipe = make_pipeline(guider=SparseGuidance())
    assert latents_of(pipe, [1], generators(0), height=6, width=12).shape == (1, 3, 6, 12)
    assert pipe(1, height=6, width=12, num_inference_steps=1).images[0].size == (12, 6)
    pipe = make_pipeline(vae=make_vae("kl"))
    assert latents_of(pipe, [1], generators(0), height=24, width=48).shape == (1, 3, 6, 12)
    assert pipe(1, height=24, width=48, num_inference_steps=1).images[0].size == (48, 24)
    assert pipe(1, num_inference_steps=1).images[0].size == (32, 32)  # 8 latent pixels of 4


@pytest.mark.parametrize("kind, factor, scale, shift", [("kl", 4, 0.18, 0.1), ("dc", 2, 0.4, 0.0)])
@torch.no_grad()
def test_the_vae_decodes_unscaled_latents(make_pipeline, make_vae, generators, kind, factor, scale, shift):
    pipe = make_pipeline(vae=make_vae(kind))
    assert pipe.vae_scale_factor == factor
    latents = latents_of(pipe, [1, 4], generators(0, 1))
    images = latents_of(pipe, [1, 4], generators(0, 1), output_type="pt")
    expected = (pipe.vae.decode(latents / scale + shift).sample / 2 + 0.5).clamp(0, 1)
    assert images.shape == (2, 3, 8 * factor, 8 * factor) and images.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_every_output_type_shows_the_same_image(make_pipeline, generators):
    pipe = make_pipeline()
    latents = latents_of(pipe, [1, 4], generators(0, 1))
    pt = latents_of(pipe, [1, 4], generators(0, 1), output_type="pt")
    array = latents_of(pipe, [1, 4], generators(0, 1), output_type="np")
    pil = latents_of(pipe, [1, 4], generators(0, 1), output_type="pil")
    torch.testing.assert_close(pt, (latents / 2 + 0.5).clamp(0, 1))
    assert array.shape == (2, 8, 8, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), np.round(array * 255).astype("uint8"))


def test_one_channel_gives_grey_images(make_transformer, make_pipeline):
    pipe = make_pipeline(transformer=make_transformer(in_channels=1))
    assert pipe(1, num_inference_steps=1).images[0].mode == "L"


def test_return_dict_false_gives_a_tuple(make_pipeline, generators):
    pipe = make_pipeline()
    output = pipe([1], num_inference_steps=2, generator=generators(0), output_type="latent", return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], latents_of(pipe, [1], generators(0), num_inference_steps=2))


# Callbacks.


def test_the_callback_sees_every_step_and_its_latents(make_pipeline, generators):
    pipe, seen = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].clone(), tensors["class_labels"].tolist()))

    names = ["latents", "class_labels"]
    settings = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    images = latents_of(pipe, [1, 4], generators(0, 1), **settings)
    assert [step for step, *_ in seen] == list(range(5))
    assert [timestep for _, timestep, *_ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], images) and seen[0][3] == [1, 4]


def test_a_callback_can_change_latents_and_labels(make_pipeline, record_calls):
    pipe = make_pipeline()
    calls, _ = record_calls(pipe.transformer)

    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], step), "class_labels": torch.tensor([3])}

    settings = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "class_labels"]}
    images = latents_of(pipe, [1], None, **settings)
    assert torch.equal(images, torch.full((1, 3, 8, 8), 4.0))
    assert [call[2].tolist() for call in calls] == [[1]] + [[3]] * 4


def test_a_callback_can_interrupt(make_pipeline, record_calls, generators):
    pipe, seen = make_pipeline(), []
    calls, _ = record_calls(pipe.transformer)

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    images = latents_of(pipe, [1], generators(0), callback_on_step_end=callback)
    assert len(calls) == 2 and torch.equal(images, seen[1]) and pipe.interrupt
    latents_of(pipe, [1], generators(0))
    assert len(calls) == 2 + 5 and not pipe.interrupt


# State: a call leaves its components as they were.


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_mode_and_router_as_they_were(make_pipeline, generators, out_of_memory, fails):
    pipe = make_pipeline(guider=SparseGuidance())
    dense = latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=1.0)
    router = get_token_router(pipe.transformer.train())
    router.defaults = RoutingCall(shared_subset=True)
    before = router.routes, router.defaults, router._surroundings.calls
    parameters = {name: parameter.clone() for name, parameter in pipe.transformer.named_parameters()}

    if fails:
        handle = out_of_memory(pipe.transformer)
        with pytest.raises(RuntimeError, match="out of memory"):
            pipe([1, 4], num_inference_steps=3)
        handle.remove()
    else:
        assert torch.equal(latents_of(pipe, [1, 4], generators(0, 1), guidance_scale=1.0), dense)
        latents_of(pipe, [1, 4], generators(0, 1))
    assert (router.routes, router.defaults, router._surroundings.calls) == before
    assert all(module.training for module in pipe.transformer.modules())
    assert all(torch.equal(parameters[name], value) for name, value in pipe.transformer.named_parameters())


def test_the_callers_latents_and_labels_are_untouched(make_pipeline):
    pipe, noise, labels = make_pipeline(), torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    before = noise.clone()
    pipe(labels, num_inference_steps=2, latents=noise)
    assert torch.equal(noise, before) and labels.tolist() == [1, 4]


def test_sampling_builds_no_graph(make_pipeline, generators):
    assert not latents_of(make_pipeline(), [1], generators(0)).requires_grad


# Precision, compilation, offloading.


@pytest.mark.parametrize("guider", [None, SparseGuidance()])
def test_bfloat16_stays_near_float32(make_pipeline, make_vae, generators, guider):
    pipe = make_pipeline(vae=make_vae("kl"), guider=guider)
    exact = latents_of(pipe, [1, 4], generators(0, 1), output_type="pt")
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    images = latents_of(pipe, [1, 4], generators(0, 1), output_type="pt")
    assert images.dtype == latents_of(pipe, [1, 4], None).dtype == torch.float32
    assert 0 < (images - exact).abs().mean() < 0.02


def test_a_compiled_transformer_gives_the_same_images_guided(make_transformer, make_pipeline, generators, counters):
    transformer = make_transformer(num_layers=4, routes=TokenRoute(start=0, end=0))
    pipe = make_pipeline(transformer=transformer, guider=SparseGuidance())
    expected = latents_of(pipe, [1, 4], generators(0, 1))
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", fullgraph=True)
    images = latents_of(pipe, [1, 4], generators(0, 1))
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert counters["unique_graphs"] == 2  # one per branch, none for later steps


@pytest.fixture
def offloadable(make_pipeline, make_vae, generators):
    """A pipeline with a VAE, and a function that draws two images."""
    pipe = make_pipeline(vae=make_vae("kl"), guider=SparseGuidance())
    return pipe, lambda: latents_of(pipe, [1, 4], generators(0, 1), output_type="pt")


@pytest.mark.parametrize("kind", ["group", "sequential"])
def test_group_and_sequential_offloading_give_the_same_images(offloadable, kind):
    if kind == "group" and Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available():
        pytest.skip("older diffusers (seen in 0.36) cannot make its group offloading hooks without an accelerator")
    pipe, draw = offloadable
    expected = draw()
    for component in (pipe.transformer, pipe.vae):
        if kind == "group":
            component.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        else:  # what enable_sequential_cpu_offload does, which wants a GPU
            pytest.importorskip("accelerate").cpu_offload(component, torch.device("cpu"))
            assert next(component.parameters()).device.type == "meta"
    assert torch.equal(draw(), expected)


def test_model_offloading_hooks_run_and_are_renewed(offloadable):
    pytest.importorskip("accelerate")
    pipe, draw = offloadable
    expected = draw()
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks of a GPU, with the CPU in its place
    assert [type(hook.model).__name__ for hook in pipe._all_hooks] == ["TREADTransformer2DModel", "AutoencoderKL"]
    for _ in range(2):
        hooks = list(pipe._all_hooks)
        assert torch.equal(draw(), expected)
        assert len(pipe._all_hooks) == 2 and not set(pipe._all_hooks) & set(hooks)
