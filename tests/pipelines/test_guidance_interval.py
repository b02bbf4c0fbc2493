# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Guidance in an interval of noise levels (arXiv 2404.07724), counted by the calls of the null branch."""

import math

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from pipeline_calls import latents_of

from diffusers_tread import EDMHeunScheduler, FlowSDEScheduler, SparseGuidance
from diffusers_tread.flops import guidance_flops
from diffusers_tread.pipelines.noise_levels import noise_levels, steps_inside


def level_of(scheduler, timestep):
    """The noise level that a network's timestep means: EDM's ln(sigma) / 4, flow's 1000 t, DDPM's index."""
    if isinstance(scheduler, DDIMScheduler):
        signal = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[int(timestep)].item()
        return math.sqrt((1 - signal) / signal)
    return math.exp(4 * timestep) if type(scheduler).__name__.startswith("EDM") else timestep / 1000


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [
        (EDMHeunScheduler(), (0.28, 2.9)),
        (EDMHeunScheduler(s_churn=10.0), (0.28, 2.9)),
        (EDMEulerScheduler(), (0.0, 5.0)),
        (FlowMatchEulerDiscreteScheduler(shift=2.0), (0.1, 0.7)),
        (FlowMatchHeunDiscreteScheduler(), (0.1, 0.7)),
        (FlowSDEScheduler(), (0.3, math.inf)),
        (DDIMScheduler(beta_start=1e-4, beta_end=0.02), (0.2, 2.0)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else None,
)
def test_the_null_branch_runs_in_the_interval_alone(make_pipeline, record_calls, scheduler, interval):
    pipe = make_pipeline(scheduler)
    calls, _ = record_calls(pipe.transformer)
    latents_of(pipe, [1], None, num_inference_steps=8, guidance_scale=2.0, guidance_interval=interval)
    assert len(calls) == pipe.num_timesteps
    levels = [level_of(scheduler, float(timestep.flatten()[0])) for _, timestep, _ in calls]
    null_calls = [step for step, (_, _, labels) in enumerate(calls) if 5 in labels.tolist()]
    assert null_calls == [step for step, level in enumerate(levels) if interval[0] < level <= interval[1]]
    assert null_calls == pipe.guided_steps and 0 < len(null_calls) < len(calls)


@pytest.mark.parametrize("interval", [(0.3, 0.7), (0.1, 0.9), (0.2, 0.6), (0.4, 0.8)])
def test_the_upper_end_is_inside_and_the_lower_one_is_not_as_written(interval):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[tenths / 10 for tenths in range(10, 0, -1)])
    tenths = [10 - step for step in steps_inside(scheduler, interval)]
    assert (max(tenths), min(tenths) - 1) == (round(10 * interval[1]), round(10 * interval[0]))


@pytest.mark.parametrize("guider", [ClassifierFreeGuidance, SparseGuidance, None])
def test_an_interval_of_levels_is_the_share_of_the_calls_that_have_them(make_pipeline, guider):
    pipe, x, sigmas = make_pipeline(FlowMatchEulerDiscreteScheduler()), torch.randn(1, 3, 8, 8), [1.0, 0.75, 0.5, 0.25]
    settings = {"guidance_scale": 2.0}
    pipe.guider = (guider or ClassifierFreeGuidance)(**settings, start=0.25, stop=0.75)
    by_share = latents_of(pipe, [1], torch.manual_seed(0), sigmas=sigmas, latents=x)
    pipe.guider = guider and guider(**settings)
    call = {"sigmas": sigmas, "latents": x} | ({} if guider else settings)
    by_level = latents_of(pipe, [1], torch.manual_seed(0), **call, guidance_interval=(0.25, 0.75))
    torch.testing.assert_close(by_level, by_share, atol=1e-5, rtol=1e-5)
    assert (latents_of(pipe, [1], torch.manual_seed(0), **call) - by_level).abs().max() > 1e-3

    # Guided calls cost, and the others one dense forward.
    guider = ClassifierFreeGuidance(guidance_scale=2.0)
    cost = guidance_flops(pipe.transformer, guider, num_steps=4, guided_steps=pipe.guided_steps)
    assert cost.share_of_cfg == 1.0 and pipe.guided_steps == [0, 1, 2, 3]
    half = guidance_flops(pipe.transformer, guider, num_steps=4, guided_steps=[1, 2])
    assert half.total == 6 * half.dense.total


def test_full_rescaling_of_a_scale_gives_the_deviation_of_the_conditional_prediction(make_pipeline):
    # arXiv 2305.08891, equation 15. One step from sigma 1 to 0 is the prediction itself.
    pipe, x = make_pipeline(FlowMatchEulerDiscreteScheduler()), torch.randn(1, 3, 8, 8)
    scales = ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_rescale": 1.0})
    plain, guided, rescaled = ((x - latents_of(pipe, 1, None, sigmas=[1.0], latents=x, **one)).std() for one in scales)
    assert abs(guided - plain) > 0.01 and rescaled.item() == pytest.approx(plain.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_interval": (0.7, 0.1)}, "0 <= low < high"),
        ({"guidance_interval": (math.nan, 1.0)}, "0 <= low < high"),
        ({"guidance_interval": (0.1,)}, "two noise levels"),
        ({"guidance_interval": (0.1, 0.7)}, "only with a guider or a guidance_scale"),
        ({"guidance_interval": (100.0, 200.0), "guidance_scale": 2.0}, r"got levels from 0.002 to 80 in 3 calls"),
        ({"guidance_scale": 2.0, "guidance_rescale": 1.5}, r"guidance_rescale in \[0, 1\]"),
        ({"guidance_rescale": 0.5}, "only with a guidance_scale"),
    ],
)
def test_settings_that_are_none_are_refused(make_pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()([1], num_inference_steps=2, **call)


def test_a_scheduler_that_tells_no_levels_is_refused():
    class Silent:
        timesteps, sigmas = torch.arange(7), torch.ones(5)

    with pytest.raises(ValueError, match="noise level of each model call, got Silent"):
        noise_levels(Silent())
