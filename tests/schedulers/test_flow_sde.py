# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""FlowSDEScheduler against SiT's equations in numpy and Gaussian data, where all moments have a closed form."""

import math

import numpy as np
import pytest
import torch
from closeness import difference, rounding
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from diffusers_tread.schedulers import FlowSDEScheduler, scheduling_flow_sde


MEAN, STD = 0.3, 0.5  # of the Gaussian data
DIFFUSIONS = [
    {},
    {"diffusion_scale": 1.0},
    {"diffusion_form": "sin2", "diffusion_scale": 1.0},
    {"diffusion_form": "sin2", "diffusion_scale": 0.7, "shift": 3.0},
]


def prepared(num_steps=None, sigmas=None, **settings):
    scheduler = FlowSDEScheduler(**settings)
    scheduler.set_timesteps(num_steps, sigmas=sigmas)
    return scheduler


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample(scheduler, network, latents, generator=None):
    """The plain diffusers loop; the network gets t in [0, 1]."""
    options = {"generator": generator} if isinstance(scheduler, FlowSDEScheduler) else {}
    for timestep in scheduler.timesteps:
        velocity = network(latents, timestep.double() / 1000)
        latents = scheduler.step(velocity, timestep, latents, **options).prev_sample
    return latents


def arbitrary_network(x, t):
    """A smooth nonlinear v, the same in numpy and torch."""
    return x / (1 + x**2) + 0.3 * t - 0.2 * x


def gaussian_network(x, t):
    """E[noise - data | x_t] of Gaussian data: x_t has the variance (1 - t)^2 STD^2 + t^2."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def interpolant_sde(network, x, times, noises, form, scale):
    """SiT's reverse SDE for any alpha and sigma (arXiv 2401.08740), here 1 - t and t; the last step without noise."""
    times, noises = [*times, 0.0], iter(noises)
    for t, next_t in zip(times, times[1:], strict=False):
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1.0, 1.0
        v = network(x, t)
        score = (alpha * v - d_alpha * x) / sigma / (d_alpha * sigma - alpha * d_sigma)
        w = scale * (sigma if form == "sigma" else np.sin(np.pi * t) ** 2)
        x = x + (v - w * score / 2) * (next_t - t)
        if next_t > 0:
            x = x + np.sqrt(w) * np.sqrt(t - next_t) * next(noises)
    return x


# The sampler itself.


@pytest.mark.parametrize("settings", DIFFUSIONS, ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_sampling_equals_the_papers_equations_in_numpy(num_steps, settings):
    shape, generator = (2, 3, 4, 4), torch.Generator().manual_seed(1)
    x, noises = noise(*shape, dtype=torch.float64), [torch.randn(shape, generator=generator, dtype=torch.float64)]
    noises += [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(num_steps)]
    times, shift = np.linspace(1, 0.04, num_steps), settings.get("shift", 1.0)
    times = shift * times / (1 + (shift - 1) * times)
    form, scale = settings.get("diffusion_form", "sigma"), settings.get("diffusion_scale", 2.0)
    expected = interpolant_sde(arbitrary_network, x.numpy(), times, [one.numpy() for one in noises], form, scale)
    actual = sample(prepared(num_steps, **settings), arbitrary_network, x, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-5)


def exact_moments(monkeypatch, num_steps, last_step=None, **settings):
    """Mean and deviation of the samples from x_1 ~ N(0, 1): for Gaussian data they are affine in all the noise."""
    drawn = []

    def impulse(shape, **_):  # 1 for the sample whose turn it is, 0 for the others
        drawn.append(torch.zeros(shape, dtype=torch.float64))
        drawn[-1][1 + len(drawn)] = 1.0
        return drawn[-1]

    monkeypatch.setattr(scheduling_flow_sde, "randn_tensor", impulse)
    scheduler = prepared(sigmas=np.linspace(1, last_step or 1 / num_steps, num_steps), **settings)
    x = torch.zeros(num_steps + 1, 1, 1, 1, dtype=torch.float64)
    x[1] = 1.0  # the response to x_1; the rest are those to the noise of each step but the last
    found = sample(scheduler, gaussian_network, x).flatten()
    assert len(drawn) == num_steps - 1
    return found[0].item(), (found[1:] - found[0]).norm().item()


@pytest.mark.parametrize("settings", DIFFUSIONS, ids=str)
def test_the_mean_is_exact_and_the_deviation_converges_with_first_order(monkeypatch, settings):
    means, deviations = zip(*[exact_moments(monkeypatch, n, **settings) for n in (100, 200, 400)], strict=True)
    np.testing.assert_allclose(means, MEAN, rtol=1e-6)  # it moves on a line, on which the score is 0
    errors = [abs(deviation - STD) for deviation in deviations]
    assert errors[-1] < 0.02 * STD
    assert all(1.7 < error / halved < 2.3 for error, halved in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize(("num_steps", "deviation"), [(25, 0.4895), (250, 0.4943), (1000, 0.4948)])
def test_the_last_step_of_the_papers_leaves_an_error_of_a_percent(monkeypatch, num_steps, deviation):
    assert exact_moments(monkeypatch, num_steps, last_step=0.04)[1] == pytest.approx(deviation, abs=1e-4)


def test_samples_have_mean_and_deviation_of_the_data():
    generator = torch.Generator().manual_seed(0)
    x = sample(prepared(250), gaussian_network, torch.randn(1, 1, 200, 200, generator=generator), generator)
    assert abs(x.mean().item() - MEAN) < 0.015
    assert abs(x.std().item() - STD) < 0.015


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_it_is_the_euler_method_of_diffusers(shift):
    levels = np.linspace(1, 1 / 20, 20)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    euler.set_timesteps(sigmas=levels)
    sde = prepared(sigmas=levels, diffusion_scale=0.0, shift=shift)
    torch.testing.assert_close(sde.timesteps, euler.timesteps, rtol=1e-6, atol=0)
    x = noise(2, 3, 4, 4)
    found, expected = (sample(one, arbitrary_network, x) for one in (sde, euler))
    assert difference(found, expected) < rounding(20 * 3)


def test_diffusers_heun_is_of_second_order_once_its_last_level_is_small():
    # Its levels end at 1 / num_train_timesteps, and the last step, from there to 0, is Euler's.
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    errors = []
    for num_steps in (21, 41, 81):
        heun = FlowMatchHeunDiscreteScheduler()
        heun.set_timesteps(num_steps)
        errors.append((sample(heun, gaussian_network, x) - (MEAN + STD * x)).abs().max().item())
    assert all(3.3 < error / halved < 4.7 for error, halved in zip(errors, errors[1:], strict=False)), errors


# The interface of diffusers.


def test_the_last_step_starts_where_it_is_asked_to():
    assert prepared(4).sigmas.tolist() == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])
    assert prepared(2, last_step_size=0.1, shift=2.0).sigmas.tolist() == pytest.approx([1.0, 0.2 / 1.1, 0.0])
    assert prepared(1).sigmas.tolist() == [1.0, 0.0] and len(FlowSDEScheduler()) == 1000


def test_list_of_generators_makes_each_sample_independent_of_its_batch():
    latents = noise(3, 1, 4, 4)

    def run(indices):
        generators = [torch.Generator().manual_seed(i) for i in indices]
        return sample(prepared(8), arbitrary_network, latents[indices], generators)

    batch = run([0, 1, 2])
    assert all(torch.equal(run([i]), batch[i : i + 1]) for i in range(3))


def test_step_returns_both_forms_rounds_once_and_leaves_its_inputs():
    x, velocity = noise(1, 1, 16, 16).bfloat16(), noise(1, 1, 16, 16, seed=1).bfloat16()
    before, generator = (x.clone(), velocity.clone()), torch.Generator()
    low = prepared(8).step(velocity, 1000.0, x, generator=generator.manual_seed(0), return_dict=False)
    high = prepared(8).step(velocity.float(), 1000.0, x.float(), generator=generator.manual_seed(0))
    assert torch.equal(low[0], high.prev_sample.bfloat16())
    assert torch.equal(low[1], high.pred_original_sample.bfloat16())
    assert torch.equal(high.pred_original_sample, x.float() - velocity.float())
    assert torch.equal(x, before[0]) and torch.equal(velocity, before[1])


def test_no_step_reads_a_tensor():
    # Meta tensors have no values: whatever would make the host wait for an accelerator raises here.
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    x = sample(scheduler, lambda x, t: x * t, torch.empty(2, 1, 4, 4, device="meta"))
    assert x.device.type == "meta" and scheduler.step_index == 6


def test_sampling_can_start_in_the_middle_with_scaled_noise():
    x, scheduler, others = noise(2, 1, 4, 4), prepared(8), noise(2, 1, 4, 4, seed=1)
    t = scheduler.timesteps[5:6]
    latents = scheduler.scale_noise(x, t, others)
    torch.testing.assert_close(latents, (1 - t / 1000) * x + t / 1000 * others)
    results = []
    for begin_index in (None, 5):
        scheduler, following = prepared(8, diffusion_scale=0.0), latents
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        for timestep in scheduler.timesteps[5:]:
            following = scheduler.step(arbitrary_network(following, timestep), timestep, following).prev_sample
        results.append(following)
        with pytest.raises(ValueError, match="one more"):
            scheduler.step(following, timestep, following)
    assert torch.equal(*results)


def test_settings_are_saved_and_shared_with_the_schedulers_of_diffusers(tmp_path):
    settings = {"shift": 2.5, "diffusion_form": "sin2", "diffusion_scale": 0.5, "last_step_size": 0.02}
    scheduler = FlowSDEScheduler(**settings)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowSDEScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in settings} == settings
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        assert kind.from_config(scheduler.config).config.shift == 2.5
        assert FlowSDEScheduler.from_config(kind(shift=2.5).config).config.shift == 2.5


# Bad input.


@pytest.mark.parametrize(
    "setting",
    [
        {"num_train_timesteps": 0},
        {"shift": 0.0},
        {"shift": math.nan},
        {"diffusion_form": "kl"},
        {"diffusion_scale": -1.0},
        {"last_step_size": 1.0},
        {"last_step_size": 0.0},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"Expected {list(setting)[0]}"):
        FlowSDEScheduler(**setting)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 0},
        {"num_inference_steps": 3, "sigmas": [0.9, 0.5]},
        {"sigmas": []},
        {"sigmas": [1.0, 0.5, 0.0]},
        {"sigmas": [0.5, 0.9]},
        {"sigmas": [1.5, 0.5]},
        {"sigmas": [1.0, math.nan]},
    ],
    ids=str,
)
def test_times_outside_their_range_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected"):
        FlowSDEScheduler().set_timesteps(**arguments)


def test_steps_that_are_none_are_refused():
    scheduler, x = FlowSDEScheduler(), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(3)
    for timestep in (1000, torch.tensor(1000), 999.0):
        with pytest.raises(ValueError, match=r"one of scheduler\.timesteps"):
            scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="the sample's shape"):
        scheduler.step(torch.zeros(2, 2, 2, 2), 1000.0, x)
    with pytest.raises(ValueError, match="one generator per sample"):
        scheduler.step(x, 1000.0, x, generator=[torch.Generator()])
