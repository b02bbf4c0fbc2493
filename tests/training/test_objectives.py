# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Objectives against their formulas in numpy and against Gaussian data, where ideal loss and samples are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from diffusers_tread.schedulers import EDMHeunScheduler
from diffusers_tread.training import EDMObjective, FlowMatchingObjective


OBJECTIVES = [
    EDMObjective(),
    EDMObjective(sigma_data=0.8, P_mean=-0.4, P_std=1.0),
    FlowMatchingObjective(),
    FlowMatchingObjective(weighting_scheme="uniform", shift=3.0),
    FlowMatchingObjective(logit_mean=0.5, logit_std=0.7, shift=0.5),
]
EDM_OBJECTIVES, FLOW_OBJECTIVES = OBJECTIVES[:2], OBJECTIVES[2:]
MEAN, STD = 0.3, 0.8  # of the Gaussian data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=6, height=4):
    return torch.randn(size, 3, height, 5, generator=seeded(7)) * STD + MEAN, torch.arange(size)


class Denoiser:
    """A tiny network that depends on all of its inputs and keeps what it was called with."""

    def __call__(self, hidden_states, timestep, class_labels, return_dict):
        assert return_dict is False
        self.hidden_states, self.timestep, self.class_labels = hidden_states, timestep, class_labels
        self.output = self.compute(hidden_states, timestep, class_labels)
        return (self.output,)

    def compute(self, hidden_states, timestep, class_labels):
        shift = torch.sin(timestep) + 0.1 * class_labels
        return torch.tanh(hidden_states) + shift[:, None, None, None].to(hidden_states.dtype)


class IdealEDMDenoiser(Denoiser):
    """F of the exact denoiser for Gaussian data: D(x; sigma) = (STD^2 x + sigma^2 MEAN) / (STD^2 + sigma^2)."""

    def __init__(self, sigma_data):
        self.sigma_data = sigma_data

    def compute(self, hidden_states, timestep, class_labels):
        sigma = (4 * timestep).exp().reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        x = hidden_states * total
        denoised = (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)
        return (denoised - self.sigma_data**2 / total**2 * x) * total / (sigma * self.sigma_data)


class IdealFlowDenoiser(Denoiser):
    """E[noise - x | z] for Gaussian data and z = (1 - t) x + t noise."""

    def compute(self, hidden_states, timestep, class_labels):
        t = (timestep / 1000).reshape(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (hidden_states - (1 - t) * MEAN)


# Parity with the formulas.


def edm_draws(objective, latents):
    """sigma `[B, 1, 1, 1]` and noise in float64, drawn as documented: noise levels, then noise."""
    generator = seeded()
    normal = torch.randn(latents.shape[0], generator=generator).double().numpy()
    noise = torch.randn(latents.shape, generator=generator).double().numpy()
    return np.exp(objective.P_mean + objective.P_std * normal)[:, None, None, None], noise


@pytest.mark.parametrize("objective", EDM_OBJECTIVES, ids=str)
def test_edm_loss_is_the_weighted_denoising_error_of_the_paper(objective):
    latents, labels = batch()
    denoiser = Denoiser()
    loss = objective.loss(denoiser, latents, labels, generator=seeded())

    sigma, noise = edm_draws(objective, latents)
    x, sigma_data = latents.double().numpy(), objective.sigma_data
    noisy = x + sigma * noise
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised = c_skip * noisy + c_out * denoiser.output.double().numpy()

    np.testing.assert_allclose(loss, (weight * (denoised - x) ** 2).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(denoiser.hidden_states, noisy / np.sqrt(sigma**2 + sigma_data**2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(denoiser.timestep, np.log(sigma).flatten() / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", FLOW_OBJECTIVES, ids=str)
def test_flow_loss_is_the_squared_error_of_the_velocity(objective):
    latents, labels = batch()
    denoiser = Denoiser()
    loss = objective.loss(denoiser, latents, labels, generator=seeded())

    generator = seeded()
    normal = torch.randn(latents.shape[0], generator=generator).double().numpy()
    noise = torch.randn(latents.shape, generator=generator).double().numpy()
    if objective.weighting_scheme == "uniform":
        t = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in normal])
    else:
        t = 1 / (1 + np.exp(-objective.logit_mean - objective.logit_std * normal))
    t = objective.shift * t / (1 + (objective.shift - 1) * t)
    t_map, x = t[:, None, None, None], latents.double().numpy()

    velocity_error = denoiser.output.double().numpy() - (noise - x)
    np.testing.assert_allclose(loss, (velocity_error**2).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(denoiser.hidden_states, (1 - t_map) * x + t_map * noise, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(denoiser.timestep, 1000 * t, rtol=1e-5)


def test_logit_normal_times_equal_those_of_diffusers():
    latents, labels = batch(32)
    denoiser = Denoiser()
    FlowMatchingObjective(logit_mean=0.5, logit_std=0.7).loss(denoiser, latents, labels, generator=seeded())
    expected = compute_density_for_timestep_sampling(
        "logit_normal", 32, logit_mean=0.5, logit_std=0.7, generator=seeded()
    )
    torch.testing.assert_close(denoiser.timestep, 1000 * expected)


# Known solutions.


@pytest.mark.parametrize("sigma", [0.002, 0.3, 20.0])
@pytest.mark.parametrize("sigma_data", [0.5, STD])
def test_edm_loss_of_the_ideal_denoiser_is_its_analytic_value(sigma, sigma_data):
    latents = MEAN + STD * torch.randn(4, 3, 100, 100, generator=seeded(7))
    objective = EDMObjective(sigma_data=sigma_data, P_mean=math.log(sigma), P_std=1e-6)
    loss = objective.loss(IdealEDMDenoiser(sigma_data), latents, torch.zeros(4), generator=seeded())
    # lambda times the variance that is left of x once x + sigma noise is known.
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    expected = weight * STD**2 * sigma**2 / (STD**2 + sigma**2)
    assert loss.mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("t", [0.01, 0.4, 0.99])
def test_flow_loss_of_the_ideal_denoiser_is_its_analytic_value(t):
    latents = MEAN + STD * torch.randn(4, 3, 100, 100, generator=seeded(7))
    objective = FlowMatchingObjective(logit_mean=math.log(t / (1 - t)), logit_std=1e-6)
    loss = objective.loss(IdealFlowDenoiser(), latents, torch.zeros(4), generator=seeded())
    # The variance that is left of noise - x once (1 - t) x + t noise is known.
    expected = STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    assert loss.mean().item() == pytest.approx(expected, rel=0.02)


def sample(objective, scheduler, denoiser, num_steps):
    """The plain diffusers loop, with the same call of the denoiser as in training."""
    scheduler.set_timesteps(num_steps)
    init_noise_sigma = scheduler.init_noise_sigma if objective.name == "edm" else 1.0
    latents = noise = init_noise_sigma * torch.randn(2, 3, 4, 5, generator=seeded())
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t) if objective.name == "edm" else latents
        output = denoiser(model_input, timestep=t.expand(2), class_labels=torch.zeros(2), return_dict=False)[0]
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents, noise


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_scheduler_samples_what_the_objective_trains(sigma_data):
    objective = EDMObjective(sigma_data=sigma_data)
    scheduler = objective.scheduler()
    assert type(scheduler) is EDMHeunScheduler
    actual, noise = sample(objective, scheduler, IdealEDMDenoiser(sigma_data), 80)
    expected = MEAN + (noise - MEAN) * STD / math.sqrt(STD**2 + 80.0**2)
    torch.testing.assert_close(actual, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_schedulers_sample_what_the_objective_trains(scheduler_class, shift):
    objective = FlowMatchingObjective(shift=shift)
    scheduler = scheduler_class.from_config(objective.scheduler().config)
    actual, noise = sample(objective, scheduler, IdealFlowDenoiser(), 400)
    expected = MEAN + STD * noise  # the flow from N(0, 1) at t = 1 to N(MEAN, STD^2) at t = 0
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_scheduler_starts_from_pure_noise_and_calls_the_network_with_1000_sigma(shift):
    scheduler = FlowMatchingObjective(shift=shift).scheduler()
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    for num_steps in (1, 20):
        scheduler.set_timesteps(num_steps)
        assert scheduler.sigmas[0] == 1.0 and scheduler.sigmas[-1] == 0.0
        torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_scheduler_spends_its_steps_with_the_shift_of_training(shift):
    scheduler = FlowMatchingObjective(shift=shift).scheduler()
    scheduler.set_timesteps(20)
    t = np.linspace(1, 0.001, 20)
    np.testing.assert_allclose(scheduler.sigmas[:-1], shift * t / (1 + (shift - 1) * t), atol=0.01)


def test_ideal_denoiser_has_the_lowest_loss():
    latents = MEAN + STD * torch.randn(64, 3, 16, 16, generator=seeded(7))
    labels = torch.zeros(64)
    for objective, ideal in (
        (EDMObjective(), IdealEDMDenoiser(0.5)),
        (FlowMatchingObjective(), IdealFlowDenoiser()),
    ):
        best = objective.loss(ideal, latents, labels, generator=seeded()).mean()
        for scale, offset in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):

            def perturbed(hidden_states, scale=scale, offset=offset, ideal=ideal, **inputs):
                return (scale * ideal(hidden_states, **inputs)[0] + offset,)

            assert objective.loss(perturbed, latents, labels, generator=seeded()).mean() > best


# The draws.


def drawn_timesteps(objective, count=20_000):
    denoiser = Denoiser()
    objective.loss(denoiser, torch.zeros(count, 1, 1, 1), torch.zeros(count), generator=seeded())
    return denoiser.timestep.double().numpy()


@pytest.mark.parametrize("objective", EDM_OBJECTIVES, ids=str)
def test_edm_noise_levels_are_log_normal(objective):
    log_sigma = 4 * drawn_timesteps(objective)
    quantiles = objective.P_mean + objective.P_std * np.array([-1.2816, 0.0, 1.2816])
    np.testing.assert_allclose(np.quantile(log_sigma, [0.1, 0.5, 0.9]), quantiles, atol=0.05)


@pytest.mark.parametrize("objective", FLOW_OBJECTIVES, ids=str)
def test_flow_times_have_the_named_distribution(objective):
    levels = np.array([0.1, 0.5, 0.9])
    if objective.weighting_scheme == "logit_normal":
        levels = 1 / (1 + np.exp(-objective.logit_mean - objective.logit_std * np.array([-1.2816, 0.0, 1.2816])))
    expected = objective.shift * levels / (1 + (objective.shift - 1) * levels)
    times = drawn_timesteps(objective) / 1000
    np.testing.assert_allclose(np.quantile(times, [0.1, 0.5, 0.9]), expected, atol=0.015)
    assert times.min() > 0 and times.max() <= 1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_seed_decides_the_loss(objective):
    latents, labels = batch()
    first, again, other = (objective.loss(Denoiser(), latents, labels, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


@pytest.mark.parametrize("objective", [EDMObjective(), FlowMatchingObjective()], ids=str)
def test_without_a_generator_torch_s_global_seed_decides(objective):
    latents, labels = batch()
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(objective.loss(Denoiser(), latents, labels))
    assert torch.equal(*losses)
    assert torch.equal(losses[0], objective.loss(Denoiser(), latents, labels, generator=seeded(3)))


# Properties.


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_sample_s_loss_does_not_depend_on_the_others(objective):
    latents, labels = batch()
    others, other_labels = latents.clone(), labels.clone()
    others[1:], other_labels[1:] = 5.0, 9
    loss = objective.loss(Denoiser(), latents, labels, generator=seeded())
    changed = objective.loss(Denoiser(), others, other_labels, generator=seeded())
    assert loss.shape == (6,)
    assert loss[0] == changed[0]
    assert not torch.isclose(loss[1:], changed[1:]).any()


@pytest.mark.parametrize("objective", [EDMObjective(), FlowMatchingObjective()], ids=str)
def test_gradient_is_that_of_the_squared_error(objective):
    latents, labels = batch()
    weight = torch.tensor(0.5, requires_grad=True)

    def linear(hidden_states, **inputs):
        return (weight * hidden_states,)

    loss = objective.loss(linear, latents, labels, generator=seeded()).mean()
    (gradient,) = torch.autograd.grad(loss, weight)

    # The loss is quadratic in the weight: a central difference is exact but for rounding.
    def at(value):
        def scaled(hidden_states, **inputs):
            return (value * hidden_states,)

        return objective.loss(scaled, latents, labels, generator=seeded()).double().mean()

    assert gradient.item() == pytest.approx(((at(1.5) - at(-0.5)) / 2).item(), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_bfloat16_latents_keep_times_and_loss_in_float32(objective):
    latents, labels = batch()
    latents = latents.bfloat16()
    denoiser, reference = Denoiser(), Denoiser()
    loss = objective.loss(denoiser, latents, labels, generator=seeded())
    expected = objective.loss(reference, latents.float(), labels, generator=seeded())
    assert denoiser.hidden_states.dtype == torch.bfloat16
    assert denoiser.timestep.dtype == loss.dtype == torch.float32
    assert torch.equal(denoiser.timestep, reference.timestep)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("objective", [EDMObjective(), FlowMatchingObjective()], ids=str)
def test_float64_latents_give_a_float32_loss(objective):
    latents, labels = batch()
    loss = objective.loss(Denoiser(), latents.double(), labels, generator=seeded())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective.loss(Denoiser(), latents, labels, generator=seeded()))


@pytest.mark.parametrize("objective", [EDMObjective(), FlowMatchingObjective()], ids=str)
def test_labels_reach_the_denoiser_and_latents_stay_untouched(objective):
    latents, labels = batch()
    before, denoiser = latents.clone(), Denoiser()
    objective.loss(denoiser, latents, labels)
    assert denoiser.class_labels is labels
    assert torch.equal(latents, before)


def test_names_tell_the_objectives_apart():
    assert (EDMObjective.name, FlowMatchingObjective.name) == ("edm", "flow")
    assert "name" not in dataclasses.asdict(EDMObjective())


# Bad input.


@pytest.mark.parametrize(
    "objective_class, field, value",
    [
        (EDMObjective, "sigma_data", 0.0),
        (EDMObjective, "P_std", -1.0),
        (EDMObjective, "P_std", 0.0),
        (EDMObjective, "P_mean", math.nan),
        (FlowMatchingObjective, "shift", 0.0),
        (FlowMatchingObjective, "shift", math.inf),
        (FlowMatchingObjective, "logit_std", 0.0),
        (FlowMatchingObjective, "logit_mean", math.inf),
        (FlowMatchingObjective, "weighting_scheme", "mode"),
    ],
)
def test_fields_outside_their_range_are_refused(objective_class, field, value):
    with pytest.raises(ValueError, match=f"Expected {field}"):
        objective_class(**{field: value})


@pytest.mark.parametrize("objective", [EDMObjective(), FlowMatchingObjective()], ids=str)
def test_latents_and_outputs_of_the_wrong_shape_are_refused(objective):
    def two_channels_more(hidden_states, **inputs):
        return (torch.cat([hidden_states, hidden_states], dim=1),)

    def one_channel(hidden_states, **inputs):  # would broadcast
        return (hidden_states[:, :1],)

    latents, labels = batch()
    for denoiser in (two_channels_more, one_channel):
        with pytest.raises(ValueError, match="Expected the denoiser to return"):
            objective.loss(denoiser, latents, labels)
    for bad_latents in (latents[0], latents.to(torch.uint8)):
        with pytest.raises(ValueError, match="Expected latents"):
            objective.loss(Denoiser(), bad_latents, labels)
