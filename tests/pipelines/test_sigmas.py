# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Noise levels given to `TREADPipeline`."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_tread import EDMHeunScheduler, FlowSDEScheduler, SparseGuidance


FLOW_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
KARRAS = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]  # EDM, equation 5


@pytest.mark.parametrize(
    "scheduler, sigmas",
    [
        (EDMHeunScheduler(s_churn=10.0), KARRAS),
        (FlowMatchEulerDiscreteScheduler(), np.linspace(1.0, 0.001, 4)),
        (FlowSDEScheduler(), np.linspace(1.0, 0.04, 4)),
        (FlowMatchLCMScheduler(), torch.linspace(1.0, 0.001, 4)),
        pytest.param(
            UniPCMultistepScheduler(**FLOW_SOLVER),
            np.linspace(1.0, 0.001, 5)[:-1].tolist(),
            marks=pytest.mark.skipif(
                "sigmas" not in inspect.signature(UniPCMultistepScheduler.set_timesteps).parameters,
                reason="older diffusers (seen in 0.36) takes no noise levels there",
            ),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_schedulers_own_levels_give_the_same_images(make_pipeline, generators, scheduler, sigmas):
    pipe = make_pipeline(scheduler, guider=SparseGuidance())
    images = [
        pipe([1, 4], generator=generators(0, 1), output_type="latent", **settings).images
        for settings in ({"num_inference_steps": 4}, {"sigmas": sigmas}, {"sigmas": [1.0, 0.7, 0.3]})
    ]
    torch.testing.assert_close(images[0], images[1], atol=1e-3, rtol=1e-3)
    assert (images[0] - images[2]).abs().max() > 0.05


def test_the_number_of_steps_is_that_of_the_levels(make_pipeline):
    pipe = make_pipeline(EDMHeunScheduler())
    pipe(1, sigmas=[10.0, 1.0, 0.1], num_inference_steps=40)
    assert pipe.num_timesteps == 5 and pipe.scheduler.sigmas.tolist() == pytest.approx([10.0, 1.0, 1.0, 0.1, 0.1, 0.0])


def test_a_shift_applies_to_the_levels_too(make_pipeline):
    pipe = make_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe(1, sigmas=[1.0, 0.5])
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])  # 3 s / (1 + 2 s)


NOT_DECREASING_TO_ABOVE_ZERO = [[], [0.0], [1.0, 0.5, 0.0], [0.5, 1.0], [1.0, 1.0], [-1.0]]
NOT_FINITE = [[math.nan], [1.0, math.nan], [math.inf, 1.0]]


@pytest.mark.parametrize("sigmas", [*NOT_DECREASING_TO_ABOVE_ZERO, *NOT_FINITE, [80.0, 1.0]], ids=str)
def test_levels_that_make_no_schedule_are_refused(make_pipeline, sigmas):
    with pytest.raises(ValueError, match=r"at most 1 \(flow matching\) and strictly decreasing, got .*Leave out"):
        make_pipeline(FlowMatchEulerDiscreteScheduler())(1, sigmas=sigmas)
    if sigmas != [80.0, 1.0]:
        with pytest.raises(ValueError, match="positive, finite and strictly decreasing, got"):
            make_pipeline(EDMHeunScheduler())(1, sigmas=sigmas)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(**FLOW_SOLVER),
        DDIMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_that_take_no_levels_are_refused(make_pipeline, scheduler):
    with pytest.raises(ValueError, match=f"that takes noise levels, got {type(scheduler).__name__}"):
        make_pipeline(scheduler)(1, sigmas=[1.0, 0.5])


def test_diffusers_edm_euler_scheduler_still_misreads_noise_levels():
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(sigmas=torch.tensor([10.0, 1.0]))
    assert scheduler.sigmas[0] != 10.0, "diffusers was repaired: let check_sigmas take EDMEulerScheduler"
