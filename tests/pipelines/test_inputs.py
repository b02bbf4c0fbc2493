# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What `TREADPipeline` accepts, and what it refuses before any work."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_tread import EDMHeunScheduler, FlowSDEScheduler, SparseGuidance


NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "great white shark, white shark", 3: "crane, lifting machine"}


# Labels.


@pytest.mark.parametrize(
    "labels, expected",
    [
        (3, [3]),
        ([3, 1], [3, 1]),
        ((3, 1), [3, 1]),
        (range(3), [0, 1, 2]),
        ([[1], [2, 3]], [1, 2, 3]),
        (torch.tensor(3), [3]),
        (torch.tensor([[1], [2]]), [1, 2]),
        ([torch.tensor([1, 2]), torch.tensor(3)], [1, 2, 3]),
        (np.array([[1], [2]]), [1, 2]),
        ([np.int64(1), 2], [1, 2]),
        ("tench", [0]),
        ("Tinca tinca", [0]),
        ("tench, Tinca tinca", [0]),
        (["white shark", 1, " lifting machine "], [2, 1, 3]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_are_ids_or_names_nested_or_not(make_pipeline, labels, expected):
    assert make_pipeline(id2label=NAMES).get_label_ids(labels) == expected


def test_names_reach_the_model_as_their_ids(make_pipeline, generators):
    pipe = make_pipeline(id2label=NAMES)
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    named = pipe(["white shark", "tench"], generator=generators(0, 1), **settings).images
    assert torch.equal(named, pipe([2, 0], generator=generators(0, 1), **settings).images)


@pytest.mark.parametrize(
    "labels, message",
    [
        ("crane", r"names classes \[1, 3\]"),
        ("dog", "Expected class names among .*'tench, Tinca tinca'.*got 'dog'"),
        ("Tench", "got 'Tench'"),
        ("", "got ''"),
        (1.0, "got 1.0"),
        (True, "got True"),
        (None, "got None"),
        ([1, None], "got None"),
        ({1: "tench"}, "Expected class ids"),
        (torch.tensor([0.5]), "got 0.5"),
        (6, r"Expected class ids in \[0, 5\].*got \[6\]"),
        ([0, -1], r"got \[-1\]"),
        ([], "at least one label"),
        (torch.zeros(0, dtype=torch.int64), "at least one label"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_that_mean_no_single_class_are_refused(make_pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(id2label=NAMES)(labels, num_inference_steps=1)


def test_names_need_id2label(make_pipeline):
    with pytest.raises(ValueError, match="only with id2label"):
        make_pipeline()("tench")


def test_the_null_class_is_a_label(make_pipeline):
    assert len(make_pipeline()(5, num_inference_steps=1).images) == 1


# Sizes, counts, generators.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 9}, "divisible by 2, got 9x8"),
        ({"width": 0}, "divisible by 2, got 8x0"),
        ({"height": -2}, "divisible by 2"),
        ({"num_inference_steps": 0}, "num_inference_steps >= 1, got 0"),
        ({"guidance_scale": float("nan")}, "Expected a finite guidance_scale or None, got nan"),
        ({"num_inference_steps": 2.5}, "integer num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"generator": [torch.Generator()]}, r"one generator per image \(2\), got 1"),
        ({"generator": [torch.Generator()] * 2, "num_images_per_prompt": 2}, r"one generator per image \(4\), got 2"),
        ({"generator": []}, r"one generator per image \(2\), got 0"),
        ({"generator": 0}, "Expected a torch.Generator"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"shape \[2, 3, 8, 8\], got \[1, 3, 8, 8\]"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"shape \[2, 3, 8, 8\], got \[2, 4, 8, 8\]"),
        ({"output_type": "jpg"}, "got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "noise"]}, r"got \['noise'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused_before_any_work(make_pipeline, settings, message):
    pipe, calls = make_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(ValueError, match=message):
        pipe([0, 1], **({"generator": generator} | settings))
    assert not calls and torch.equal(generator.get_state(), before)


def test_sizes_count_the_vaes_stride(make_pipeline, make_vae):
    pipe = make_pipeline(vae=make_vae("kl"))
    with pytest.raises(ValueError, match="divisible by 8, got 28x32"):  # 4 pixels per latent pixel, patches of 2
        pipe(0, height=28, num_inference_steps=1)
    assert pipe(0, height=24, num_inference_steps=1).images[0].size == (32, 24)


# Components.

MATCHING = {
    "edm": [EDMHeunScheduler(), EDMEulerScheduler(), EDMDPMSolverMultistepScheduler()],
    "flow": [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        FlowSDEScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    "epsilon": [DDIMScheduler(), EulerDiscreteScheduler(), DPMSolverMultistepScheduler()],
}
OF_NONE = [
    DPMSolverMultistepScheduler(use_flow_sigmas=True),  # noise prediction at the noise levels of flow matching
    EulerDiscreteScheduler(prediction_type="v_prediction"),
    EDMHeunScheduler(prediction_type="v_prediction"),
    FlowSDEScheduler(num_train_timesteps=500),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction"),  # with the noise levels of DDPM
]


@pytest.mark.parametrize("objective", MATCHING)
def test_only_schedulers_of_the_models_objective_are_taken(make_transformer, make_pipeline, objective):
    transformer = make_transformer(objective=objective)
    for scheduler in MATCHING[objective]:
        assert make_pipeline(scheduler, transformer).scheduler is scheduler
    others = [scheduler for kind, schedulers in MATCHING.items() if kind != objective for scheduler in schedulers]
    for scheduler in others + OF_NONE:
        with pytest.raises(ValueError, match=f"objective '{objective}', got {type(scheduler).__name__}"):
            make_pipeline(scheduler, transformer)


def test_a_scheduler_put_in_later_is_checked_too(make_transformer, make_pipeline):
    pipe = make_pipeline(transformer=make_transformer(objective="edm"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="objective 'edm'"):
        pipe(0, num_inference_steps=1)


def test_models_of_unknown_objective_are_refused(make_transformer, make_pipeline):
    with pytest.raises(
        ValueError, match=r"with an objective in its config.*one of \['edm', 'flow', 'epsilon', 'jit'\]"
    ):
        make_pipeline(transformer=make_transformer(objective=None))
    with pytest.raises(ValueError, match=r"Expected an objective among .*got 'score'.*register_objective"):
        make_pipeline(transformer=make_transformer(objective="score"))


def test_vaes_and_outputs_of_other_channels_are_refused(make_transformer, make_pipeline, make_vae):
    with pytest.raises(ValueError, match="the transformer's 3 channels, got AutoencoderKL with 4"):
        make_pipeline(vae=make_vae("kl", latent_channels=4))
    with pytest.raises(ValueError, match=r"input channels \(3\), got out_channels=6"):
        make_pipeline(transformer=make_transformer(out_channels=6))

    # A VAE put in later is checked by the call.
    pipe = make_pipeline()
    pipe.vae = make_vae("kl", latent_channels=4)
    with pytest.raises(ValueError, match="the transformer's 3 channels"):
        pipe(0, num_inference_steps=1)


def test_sparse_guidance_of_a_model_without_routes_is_refused(make_transformer, make_pipeline):
    pipe = make_pipeline(transformer=make_transformer(routes=None), guider=SparseGuidance())
    with pytest.raises(ValueError, match="Expected a denoiser with token routes"):
        pipe(0, num_inference_steps=1)
    assert len(pipe(0, num_inference_steps=1, guidance_scale=1.5).images) == 1
