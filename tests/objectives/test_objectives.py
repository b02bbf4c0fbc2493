# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Objectives against their formulas in numpy and against Gaussian data, where ideal loss and samples are known."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from diffusers_tread import EDMObjective, EpsilonObjective, FlowMatchingObjective, RoutingCall, TREADTransformer2DModel
from diffusers_tread.objectives import LossTerm, find_objective
from diffusers_tread.schedulers import EDMHeunScheduler


OBJECTIVES = [
    EDMObjective(),
    EDMObjective(sigma_data=0.8, P_mean=-0.4, P_std=1.0),
    FlowMatchingObjective(),
    FlowMatchingObjective(weighting_scheme="uniform", shift=3.0),
    FlowMatchingObjective(logit_mean=0.5, logit_std=0.7, shift=0.5),
    EpsilonObjective(),
    EpsilonObjective(num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
]
EDM_OBJECTIVES, FLOW_OBJECTIVES, EPSILON_OBJECTIVES = OBJECTIVES[:2], OBJECTIVES[2:5], OBJECTIVES[5:]
DEFAULTS = [EDMObjective(), FlowMatchingObjective(), EpsilonObjective()]
MEAN, STD = 0.3, 0.8  # of the Gaussian data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=6):
    return torch.randn(size, 3, 4, 5, generator=seeded(7)) * STD + MEAN, torch.arange(size)


def loss_of(objective, denoiser=None, latents=None, labels=None, generator=0):
    """The losses of `batch()` or of other latents, from the seed `generator`; torch's global one for None."""
    latents, labels = (batch()[0] if latents is None else latents), (batch()[1] if labels is None else labels)
    generator = None if generator is None else seeded(generator)
    return objective.loss(denoiser or Denoiser(), latents, class_labels=labels, generator=generator)


class Denoiser:
    """A tiny network that depends on all of its inputs and keeps what it was called with."""

    def __call__(self, hidden_states, timestep, class_labels):
        self.hidden_states, self.timestep, self.class_labels = hidden_states, timestep, class_labels
        self.output = self.compute(hidden_states, timestep, class_labels)
        return SimpleNamespace(sample=self.output)

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


class IdealEpsilonDenoiser(Denoiser):
    """E[noise | z] for Gaussian data and z = sqrt(abar) x + sqrt(1 - abar) noise, with DDPM's betas."""

    def compute(self, hidden_states, timestep, class_labels):
        alpha_bar = DDPMScheduler(beta_schedule="linear").alphas_cumprod[timestep.long()].reshape(-1, 1, 1, 1)
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() / variance * (hidden_states - alpha_bar.sqrt() * MEAN)


# Parity with the formulas.


def draws(latents):
    """A normal number per sample, which decides its noise level, then the noise, as documented; in float64."""
    generator = seeded()
    shapes = ((latents.shape[0],), latents.shape)
    return [torch.randn(shape, generator=generator).double().numpy() for shape in shapes]


def normal_distribution(values):
    return np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in values])


@pytest.mark.parametrize("objective", EDM_OBJECTIVES, ids=str)
def test_edm_loss_is_the_weighted_denoising_error_of_the_paper(objective):
    latents, denoiser = batch()[0], Denoiser()
    loss = loss_of(objective, denoiser)

    normal, noise = draws(latents)
    sigma = np.exp(objective.P_mean + objective.P_std * normal)[:, None, None, None]
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
    latents, denoiser = batch()[0], Denoiser()
    loss = loss_of(objective, denoiser)

    normal, noise = draws(latents)
    if objective.weighting_scheme == "uniform":
        t = normal_distribution(normal)
    else:
        t = 1 / (1 + np.exp(-objective.logit_mean - objective.logit_std * normal))
    t = objective.shift * t / (1 + (objective.shift - 1) * t)
    t_map, x = t[:, None, None, None], latents.double().numpy()

    velocity_error = denoiser.output.double().numpy() - (noise - x)
    np.testing.assert_allclose(loss, (velocity_error**2).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(denoiser.hidden_states, (1 - t_map) * x + t_map * noise, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(denoiser.timestep, 1000 * t, rtol=1e-5)


@pytest.mark.parametrize("objective", EPSILON_OBJECTIVES, ids=str)
def test_epsilon_loss_is_the_squared_error_of_the_noise_that_diffusers_adds(objective):
    latents, denoiser = batch()[0], Denoiser()
    loss = loss_of(objective, denoiser)

    normal, noise = draws(latents)
    t = np.floor(normal_distribution(normal) * objective.num_train_timesteps)
    scheduler = DDPMScheduler.from_config(objective.scheduler().config)
    expected = scheduler.add_noise(latents, torch.tensor(noise).float(), torch.tensor(t).long())

    assert denoiser.timestep.tolist() == t.tolist()
    np.testing.assert_allclose(denoiser.hidden_states, expected, rtol=1e-4, atol=1e-6)
    error = denoiser.output.double().numpy() - noise
    np.testing.assert_allclose(loss, (error**2).mean((1, 2, 3)), rtol=1e-4)


def test_logit_normal_times_equal_those_of_diffusers():
    denoiser, settings = Denoiser(), {"logit_mean": 0.5, "logit_std": 0.7}
    loss_of(FlowMatchingObjective(**settings), denoiser, *batch(32))
    expected = compute_density_for_timestep_sampling("logit_normal", 32, **settings, generator=seeded())
    torch.testing.assert_close(denoiser.timestep, 1000 * expected)


# Known solutions.


def loss_of_gaussian(objective, denoiser):
    latents = MEAN + STD * torch.randn(4, 3, 100, 100, generator=seeded(7))
    return loss_of(objective, denoiser, latents, torch.zeros(4))


@pytest.mark.parametrize("sigma", [0.002, 0.3, 20.0])
@pytest.mark.parametrize("sigma_data", [0.5, STD])
def test_edm_loss_of_the_ideal_denoiser_is_its_analytic_value(sigma, sigma_data):
    objective = EDMObjective(sigma_data=sigma_data, P_mean=math.log(sigma), P_std=1e-6)
    loss = loss_of_gaussian(objective, IdealEDMDenoiser(sigma_data))
    # lambda times the variance that is left of x once x + sigma noise is known.
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    expected = weight * STD**2 * sigma**2 / (STD**2 + sigma**2)
    assert loss.mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("t", [0.01, 0.4, 0.99])
def test_flow_loss_of_the_ideal_denoiser_is_its_analytic_value(t):
    objective = FlowMatchingObjective(logit_mean=math.log(t / (1 - t)), logit_std=1e-6)
    loss = loss_of_gaussian(objective, IdealFlowDenoiser())
    # The variance that is left of noise - x once (1 - t) x + t noise is known.
    expected = STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    assert loss.mean().item() == pytest.approx(expected, rel=0.02)


def test_epsilon_loss_of_the_ideal_denoiser_is_its_analytic_value():
    denoiser = IdealEpsilonDenoiser()
    loss = loss_of_gaussian(EpsilonObjective(), denoiser)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[denoiser.timestep.long().numpy()]
    # The variance that is left of the noise once z is known.
    expected = alpha_bar * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    np.testing.assert_allclose(loss, expected, rtol=0.03)


def sample(objective, scheduler, denoiser, num_steps):
    """The plain diffusers loop, with the same call of the denoiser as in training."""
    scheduler.set_timesteps(num_steps)
    is_edm = isinstance(objective, EDMObjective)
    latents = noise = (scheduler.init_noise_sigma if is_edm else 1.0) * torch.randn(2, 3, 4, 5, generator=seeded())
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t) if is_edm else latents
        output = denoiser(model_input, timestep=t.expand(2), class_labels=torch.zeros(2)).sample
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


def test_the_epsilon_scheduler_samples_what_the_objective_trains():
    objective = EpsilonObjective()
    scheduler = objective.scheduler()
    assert type(scheduler) is DDIMScheduler
    actual, noise = sample(objective, scheduler, IdealEpsilonDenoiser(), 1000)
    torch.testing.assert_close(actual, MEAN + STD * noise, atol=0.03, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_scheduler_starts_from_pure_noise_and_takes_its_steps_with_the_shift_of_training(shift):
    scheduler = FlowMatchingObjective(shift=shift).scheduler()
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    for num_steps in (1, 20):
        scheduler.set_timesteps(num_steps)
        assert scheduler.sigmas[0] == 1.0 and scheduler.sigmas[-1] == 0.0
        torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    t = np.linspace(1, 0.001, 20)
    np.testing.assert_allclose(scheduler.sigmas[:-1], shift * t / (1 + (shift - 1) * t), atol=0.01)


def test_ideal_denoiser_has_the_lowest_loss():
    data = MEAN + STD * torch.randn(64, 3, 16, 16, generator=seeded(7)), torch.zeros(64)
    for objective, ideal in (
        (EDMObjective(), IdealEDMDenoiser(0.5)),
        (FlowMatchingObjective(), IdealFlowDenoiser()),
        (EpsilonObjective(), IdealEpsilonDenoiser()),
    ):
        best = loss_of(objective, ideal, *data).mean()
        for scale, offset in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):

            def perturbed(hidden_states, scale=scale, offset=offset, ideal=ideal, **inputs):
                return SimpleNamespace(sample=scale * ideal(hidden_states, **inputs).sample + offset)

            assert loss_of(objective, perturbed, *data).mean() > best


# The draws.


def drawn_timesteps(objective, count=20_000):
    denoiser = Denoiser()
    loss_of(objective, denoiser, torch.zeros(count, 1, 1, 1), torch.zeros(count))
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
    first, again, other = (loss_of(objective, generator=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_without_a_generator_torch_s_global_seed_decides(objective):
    torch.manual_seed(3)
    assert torch.equal(loss_of(objective, generator=None), loss_of(objective, generator=3))


# Properties.


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_sample_s_loss_does_not_depend_on_the_others(objective):
    latents, labels = batch()
    others, other_labels = latents.clone(), labels.clone()
    others[1:], other_labels[1:] = 5.0, 9
    loss, changed = loss_of(objective), loss_of(objective, None, others, other_labels)
    assert loss.shape == (6,)
    assert loss[0] == changed[0]
    assert not torch.isclose(loss[1:], changed[1:]).any()


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_gradient_is_that_of_the_squared_error(objective):
    def at(weight):
        def linear(hidden_states, **inputs):
            return SimpleNamespace(sample=weight * hidden_states)

        return loss_of(objective, linear).double().mean()

    weight = torch.tensor(0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(at(weight), weight)
    # The loss is quadratic in the weight: a central difference is exact but for rounding.
    assert gradient.item() == pytest.approx(((at(1.5) - at(-0.5)) / 2).item(), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_bfloat16_latents_keep_times_and_loss_in_float32(objective):
    latents, denoiser, reference = batch()[0].bfloat16(), Denoiser(), Denoiser()
    loss, expected = loss_of(objective, denoiser, latents), loss_of(objective, reference, latents.float())
    assert denoiser.hidden_states.dtype == torch.bfloat16
    assert denoiser.timestep.dtype == loss.dtype == torch.float32
    assert torch.equal(denoiser.timestep, reference.timestep)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_float64_latents_give_a_float32_loss(objective):
    loss = loss_of(objective, latents=batch()[0].double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(objective))


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_labels_reach_the_denoiser_and_latents_stay_untouched(objective):
    (latents, labels), denoiser = batch(), Denoiser()
    loss_of(objective, denoiser, latents, labels)
    assert denoiser.class_labels is labels
    assert torch.equal(latents, batch()[0])


def test_names_tell_the_objectives_apart():
    assert [objective.name for objective in DEFAULTS] == ["edm", "flow", "epsilon"]
    assert "name" not in dataclasses.asdict(EDMObjective())
    assert find_objective("flow") is FlowMatchingObjective
    with pytest.raises(ValueError, match=r"objective among \['edm', 'flow', 'epsilon', 'jit'\], got 'ddpm'"):
        find_objective("ddpm")


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_an_objective_accepts_its_own_scheduler_and_refuses_the_others(objective):
    assert [other.accepts(objective.scheduler()) for other in DEFAULTS] == [other == objective for other in DEFAULTS]


# The denoiser and the terms.


def tiny_model(**changes):
    config = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 6, "sample_size": 8, "num_classes": 4}
    model = TREADTransformer2DModel(**config | {"in_channels": 3, "objective": "flow"} | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=seeded(1))
    return model


class LargestToken(LossTerm):
    """A term that sees everything a record has."""

    hidden_states_at = (1, 4)

    @classmethod
    def for_model(cls, model):
        return cls()

    def __call__(self, record):
        self.record = record
        return record.hidden_states[4].abs().amax(dim=(1, 2))


def test_terms_are_added_and_see_the_forward():
    model, latents, labels = tiny_model().train(), torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 1])
    term, routing = LargestToken(), RoutingCall(seed=3)
    objective = FlowMatchingObjective()
    settings = {"class_labels": labels, "routing": routing}
    plain = objective.loss(model, latents, generator=seeded(), **settings)
    loss = objective.loss(model, latents, generator=seeded(), terms=(term, term), **settings)

    record, noised = term.record, objective.corrupt(latents, seeded())
    output = model(
        noised.hidden_states, noised.timestep, class_labels=labels, routing=routing, hidden_states_at=(1, 4)
    )
    torch.testing.assert_close(loss, plain + 2 * output.hidden_states[4].abs().amax(dim=(1, 2)))
    assert torch.equal(record.prediction, output.sample) and torch.equal(record.target, noised.target)
    assert torch.equal(record.noisy, noised.noisy) and torch.equal(record.timestep, noised.timestep)
    assert record.latents is latents and record.conditions == {"class_labels": labels}
    assert torch.equal(record.kept_token_ids[0], output.kept_token_ids[0])
    assert set(record.hidden_states) == {1, 4}


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_a_prediction_stands_for_the_latents_that_it_would_have_been_right_about(objective):
    latents, _ = batch()
    noised = objective.corrupt(latents, seeded())
    torch.testing.assert_close(noised.denoise(noised.target), latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_a_model_for_another_objective_is_refused(wrap):
    model, latents = wrap(tiny_model(objective="edm")), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="for the objective 'flow', got .* with objective='edm'"):
        FlowMatchingObjective().loss(model, latents)
    assert EDMObjective().loss(model, latents).shape == (2,)


def test_a_misspelled_condition_is_refused_by_the_denoiser():
    with pytest.raises(TypeError, match="class_label"):
        FlowMatchingObjective().loss(tiny_model(), torch.randn(2, 3, 8, 8), class_label=torch.tensor([0, 1]))


def test_a_denoiser_that_gives_no_hidden_states_is_told_what_a_term_asks_for():
    with pytest.raises(ValueError, match=r"Expected the denoiser to give the tokens after blocks \[1, 4\]"):
        FlowMatchingObjective().loss(
            lambda latents, **_: SimpleNamespace(sample=latents), torch.randn(2, 3, 8, 8), terms=[LargestToken()]
        )


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
        (EpsilonObjective, "beta_end", 0.0),
        (EpsilonObjective, "num_train_timesteps", 0),
    ],
)
def test_fields_outside_their_range_are_refused(objective_class, field, value):
    with pytest.raises(ValueError, match=f"Expected {field}"):
        objective_class(**{field: value})


@pytest.mark.parametrize("objective", DEFAULTS, ids=str)
def test_latents_and_outputs_of_the_wrong_shape_are_refused(objective):
    def two_channels_more(hidden_states, **inputs):
        return SimpleNamespace(sample=torch.cat([hidden_states, hidden_states], dim=1))

    def one_channel(hidden_states, **inputs):  # would broadcast
        return SimpleNamespace(sample=hidden_states[:, :1])

    for denoiser in (two_channels_more, one_channel):
        with pytest.raises(ValueError, match="Expected the denoiser to return"):
            loss_of(objective, denoiser)
    latents, _ = batch()
    for bad_latents in (latents[0], latents.to(torch.uint8), 128 + 100 * latents):
        with pytest.raises(ValueError, match="Expected latents"):
            loss_of(objective, latents=bad_latents)
