# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""EDMHeunScheduler against EDM's Algorithm 2 in numpy and against Gaussian data, where sampling has a closed form."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from closeness import difference, rounding
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffusers_tread.schedulers import EDMHeunScheduler


SIGMA_DATA = 0.5
MEAN, STD = 0.3, 0.8  # of the Gaussian data
EDM_CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}  # EDM, Table 5, ImageNet-64
CHURN_SETTINGS = [
    {},
    EDM_CHURN,
    {"s_churn": 10.0},
    {"s_churn": 5.0, "s_tmin": 1.0},
    {"s_churn": 5.0, "s_tmax": 1.0, "s_noise": 0.9},
]


def prepared(num_steps, **settings):
    scheduler = EDMHeunScheduler(**settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


def starting_noise(*shape):
    return 80 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sample(scheduler, denoiser, latents, generator=None):
    """The plain diffusers loop."""
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(denoiser(model_input, t), t, latents, generator=generator).prev_sample
    return latents


def arbitrary_network(scaled_input, c_noise):
    """A smooth nonlinear F, the same in numpy and torch."""
    return scaled_input / (1 + scaled_input**2) + 0.3 * c_noise - 0.2 * scaled_input


def gaussian_network(scaled_input, c_noise):
    """The F whose denoiser is exact for Gaussian data: D(x; sigma) = (STD^2 x + sigma^2 MEAN) / (STD^2 + sigma^2)."""
    sigma = (4 * c_noise).exp()
    total = (sigma**2 + SIGMA_DATA**2).sqrt()
    x = scaled_input * total
    denoised = (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)
    return (denoised - SIGMA_DATA**2 / total**2 * x) * total / (sigma * SIGMA_DATA)


def gaussian_solution(x, sigma_start):
    """Where the probability-flow ODE of the Gaussian data carries x, from sigma_start to 0."""
    return MEAN + (x - MEAN) * STD / math.sqrt(STD**2 + sigma_start**2)


def karras(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM, Equation 5."""
    i = np.arange(num_steps)
    return (
        sigma_max ** (1 / rho) + i / max(num_steps - 1, 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    ) ** rho


def algorithm_2(network, x, sigmas, noises, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """EDM, Algorithm 2, line by line. `noises` are taken in order, one for each step that is churned."""

    def denoise(x, sigma):
        total = sigma**2 + SIGMA_DATA**2
        output = network(x / np.sqrt(total), np.log(sigma) / 4)
        return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / np.sqrt(total) * output

    noises = iter(noises)
    levels = [*sigmas, 0.0]
    for i, t in enumerate(sigmas):
        gamma = min(s_churn / len(sigmas), np.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        x_hat = x + np.sqrt(t_hat**2 - t**2) * s_noise * next(noises) if gamma > 0 else x
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (levels[i + 1] - t_hat) * d
        if levels[i + 1] != 0:
            d_prime = (x - denoise(x, levels[i + 1])) / levels[i + 1]
            x = x_hat + (levels[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


def assert_matches_algorithm_2(scheduler, sigmas, churn):
    shape = (2, 3, 4, 4)
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigmas[0]
    noises_generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(shape, generator=noises_generator, dtype=torch.float64) for _ in sigmas]
    expected = algorithm_2(arbitrary_network, x_0.numpy(), sigmas, [noise.numpy() for noise in noises], **churn)

    # The loop starts from x_hat_0, so step 0's churn is added here; the scheduler draws the others in the same order.
    generator = torch.Generator().manual_seed(1)
    sigma_hat = math.exp(4 * scheduler.timesteps[0].double().item())
    latents = x_0
    if sigma_hat > sigmas[0] * 1.0001:
        first = torch.randn(shape, generator=generator, dtype=torch.float64)
        latents = x_0 + churn.get("s_noise", 1.0) * math.sqrt(sigma_hat**2 - sigmas[0] ** 2) * first
    actual = sample(scheduler, arbitrary_network, latents, generator)

    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-5)


# The sampler itself.


@pytest.mark.parametrize("churn", CHURN_SETTINGS, ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_sampling_equals_algorithm_2_in_numpy(num_steps, churn):
    scheduler = prepared(num_steps, **churn)
    assert_matches_algorithm_2(scheduler, karras(num_steps), churn)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 2.0}], ids=str)
def test_custom_sigmas_equal_algorithm_2_in_numpy(churn):
    sigmas = [30.0, 11.0, 2.5, 0.4, 0.01]
    scheduler = EDMHeunScheduler(**churn)
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.num_inference_steps == 5
    assert_matches_algorithm_2(scheduler, sigmas, churn)


def test_churn_changes_samples_and_windows_limit_it():
    latents, results = starting_noise(1, 1, 4, 4), []
    for churn in ({}, {"s_churn": 5.0}, {"s_churn": 5.0, "s_tmin": 1.0}, {"s_churn": 5.0, "s_tmin": 81.0}):
        results.append(sample(prepared(8, **churn), arbitrary_network, latents, torch.Generator().manual_seed(1)))
    assert not torch.allclose(results[0], results[1], atol=1e-2)
    assert not torch.allclose(results[1], results[2], atol=1e-2)
    assert torch.equal(results[0], results[3])


def sampling_error(scheduler_class, num_steps):
    scheduler = scheduler_class(sigma_min=1e-3, sigma_max=10.0)
    scheduler.set_timesteps(num_steps)
    x = torch.linspace(-20, 20, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    return (sample(scheduler, gaussian_network, x) - gaussian_solution(x, 10.0)).abs().max().item()


def test_heun_converges_with_second_order_and_euler_with_first():
    heun = [sampling_error(EDMHeunScheduler, n) for n in (16, 32, 64)]
    euler = [sampling_error(EDMEulerScheduler, n) for n in (16, 32, 64)]
    for halving in range(2):
        assert 1.8 < math.log2(heun[halving] / heun[halving + 1]) < 2.3
        assert 0.8 < math.log2(euler[halving] / euler[halving + 1]) < 1.2


def test_gaussian_data_is_sampled_to_its_closed_form():
    x = starting_noise(4, 1, 8, 8)
    found = sample(prepared(160), gaussian_network, x)
    torch.testing.assert_close(found, gaussian_solution(x, 80.0), atol=3e-3, rtol=0)


def test_churned_samples_have_mean_and_deviation_of_the_data():
    scheduler = prepared(160, s_churn=40.0)
    generator = torch.Generator().manual_seed(0)
    x = scheduler.init_noise_sigma * torch.randn(1, 1, 200, 200, generator=generator)
    x = sample(scheduler, gaussian_network, x, generator)
    assert abs(x.mean().item() - MEAN) < 0.015
    assert abs(x.std().item() - STD) < 0.015


# The schedule.


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_timesteps_are_log_sigma_over_four_of_2n_minus_1_karras_calls(num_steps):
    scheduler = prepared(num_steps)
    expected = np.repeat(karras(num_steps), 2)[1:]  # one call at sigma_max, then corrector and predictor at each level
    assert scheduler.timesteps.shape == (2 * num_steps - 1,)
    np.testing.assert_allclose(scheduler.timesteps, np.log(expected) / 4, atol=1e-6)
    np.testing.assert_allclose(scheduler.sigmas, [*expected, 0.0], rtol=1e-6)


def test_exponential_schedule_is_evenly_spaced_in_log_sigma():
    timesteps = prepared(9, sigma_schedule="exponential").timesteps[::2]
    np.testing.assert_allclose(timesteps, np.linspace(math.log(80), math.log(0.002), 9) / 4, rtol=0, atol=1e-6)


def test_timesteps_follow_the_churned_noise_level():
    scheduler = prepared(18, **EDM_CHURN)
    sigmas = karras(18)
    gammas = np.where((sigmas >= 0.05) & (sigmas <= 50), min(40 / 18, math.sqrt(2) - 1), 0.0)
    np.testing.assert_allclose(scheduler.timesteps[::2], np.log(sigmas * (1 + gammas)) / 4, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps[1::2], np.log(sigmas[1:]) / 4, atol=1e-6)


def test_init_noise_sigma_is_the_deviation_of_the_first_churned_sample():
    assert prepared(10).init_noise_sigma == pytest.approx(80.0, rel=1e-12)
    churn_deviation = 1.1 * 80 * math.sqrt(1.2**2 - 1)  # gamma = 2 / 10
    scheduler = prepared(10, s_churn=2.0, s_noise=1.1)
    assert scheduler.init_noise_sigma == pytest.approx(math.hypot(80.0, churn_deviation), rel=1e-12)


def test_before_set_timesteps_the_training_levels_are_listed():
    scheduler = EDMHeunScheduler(num_train_timesteps=50)
    assert len(scheduler) == 50
    np.testing.assert_allclose(scheduler.timesteps, np.log(karras(50)) / 4, atol=1e-6)


# The diffusers interface.


def test_list_of_generators_makes_each_sample_independent_of_its_batch():
    scheduler = EDMHeunScheduler(**EDM_CHURN)
    latents = starting_noise(3, 1, 4, 4)

    def run(indices):
        scheduler.set_timesteps(8)
        generators = [torch.Generator().manual_seed(i) for i in indices]
        return sample(scheduler, arbitrary_network, latents[indices], generators)

    batch = run([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(run([i]), batch[i : i + 1], rtol=0, atol=0)


def test_bfloat16_sampling_stays_near_float32():
    x = starting_noise(2, 1, 8, 8)
    expected = sample(prepared(18), gaussian_network, x)
    actual = sample(prepared(18), lambda x, t: gaussian_network(x.float(), t).bfloat16(), x.bfloat16())
    assert actual.dtype == torch.bfloat16
    # What the early steps round goes with their noise.
    assert difference(actual, expected) < rounding(1, torch.bfloat16)


def test_bfloat16_steps_are_rounded_only_once():
    low, high = prepared(18), prepared(18)
    x = starting_noise(1, 1, 16, 16).bfloat16()
    for t in low.timesteps:
        model_output = arbitrary_network(low.scale_model_input(x, t), t).bfloat16()
        exact = high.step(model_output.double(), t, x.double()).prev_sample
        x = low.step(model_output, t, x).prev_sample
        # Both see the same inputs, so they differ by one rounding, up to the odd tie of 256; 0.6 if rounded twice.
        assert (x == exact.bfloat16()).float().mean() > 0.95


def test_step_returns_the_denoised_sample_in_both_forms():
    x, scheduler = starting_noise(2, 1, 4, 4), prepared(4)
    t = scheduler.timesteps[0]
    model_output = gaussian_network(scheduler.scale_model_input(x, t), t)
    as_tuple = copy.deepcopy(scheduler).step(model_output, t, x, return_dict=False)
    output = scheduler.step(model_output, t, x)
    assert torch.equal(as_tuple[0], output.prev_sample) and torch.equal(as_tuple[1], output.pred_original_sample)
    expected = (STD**2 * x + 80.0**2 * MEAN) / (STD**2 + 80.0**2)
    torch.testing.assert_close(output.pred_original_sample, expected, rtol=1e-4, atol=1e-4)


def test_step_leaves_its_inputs_untouched():
    x, scheduler = starting_noise(1, 1, 4, 4), prepared(4, **EDM_CHURN)
    for t in scheduler.timesteps:
        model_output = arbitrary_network(scheduler.scale_model_input(x, t), t)
        before = x.clone(), model_output.clone()
        x_next = scheduler.step(model_output, t, x).prev_sample
        assert torch.equal(x, before[0]) and torch.equal(model_output, before[1])
        x = x_next


def test_v_prediction_negates_the_network():
    x = starting_noise(1, 1, 4, 4)
    expected = sample(prepared(5), arbitrary_network, x)
    found = sample(prepared(5, prediction_type="v_prediction"), lambda x, t: -arbitrary_network(x, t), x)
    assert torch.equal(found, expected)


def test_no_step_reads_a_tensor():
    # Meta tensors have no values: whatever would make the host wait for an accelerator raises here.
    scheduler = EDMHeunScheduler(**EDM_CHURN)
    scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    x = sample(scheduler, lambda x, t: x * t, torch.empty(2, 1, 4, 4, device="meta"))
    assert x.device.type == "meta" and scheduler.step_index == 11


def test_sampling_can_start_in_the_middle():
    x, reference = starting_noise(1, 1, 4, 4), prepared(8)
    expected = sample(prepared(8), arbitrary_network, x)

    # The sample after three steps, continued by a second run: found by its timestep and by begin_index.
    for t in reference.timesteps[:6]:
        model_output = arbitrary_network(reference.scale_model_input(x, t), t)
        x = reference.step(model_output, t, x).prev_sample
    for begin_index in (None, 6):
        scheduler = prepared(8)
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        latents = x
        for t in scheduler.timesteps[6:]:
            model_output = arbitrary_network(scheduler.scale_model_input(latents, t), t)
            latents = scheduler.step(model_output, t, latents).prev_sample
        assert torch.equal(latents, expected)


def test_add_noise_uses_the_sigma_of_each_timestep():
    scheduler = prepared(8, **EDM_CHURN)
    x, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = scheduler.timesteps[[0, 5, 9]]
    expected = x + scheduler.sigmas[[0, 5, 9]].view(3, 1, 1, 1) * noise
    np.testing.assert_allclose(scheduler.add_noise(x, noise, timesteps), expected, rtol=1e-5, atol=1e-6)
    assert scheduler.add_noise(x.bfloat16(), noise.bfloat16(), timesteps).dtype == torch.bfloat16


def test_save_and_load_keep_the_configuration_and_the_samples(tmp_path):
    scheduler = EDMHeunScheduler(sigma_data=0.7, rho=5.0, **EDM_CHURN)
    scheduler.save_pretrained(tmp_path)
    loaded = EDMHeunScheduler.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert settings["sigma_data"] == 0.7 and settings["s_tmax"] == 50.0
    scheduler.set_timesteps(6)
    loaded.set_timesteps(6)
    x = starting_noise(1, 1, 4, 4)
    runs = [sample(s, arbitrary_network, x, torch.Generator().manual_seed(0)) for s in (scheduler, loaded)]
    assert torch.equal(*runs)


def test_default_configuration_is_strict_json(tmp_path):
    EDMHeunScheduler().save_pretrained(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "scheduler_config.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("other_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_from_config_carries_the_shared_settings_both_ways(other_class):
    shared = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7, "rho": 5.0, "num_train_timesteps": 90}
    shared |= {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}
    heun = EDMHeunScheduler(**shared, **EDM_CHURN)
    other = other_class.from_config(heun.config)
    assert {name: other.config[name] for name in shared} == shared
    assert {name: EDMHeunScheduler.from_config(other_class(**shared).config).config[name] for name in shared} == shared

    # There and back again nothing is lost, churn included.
    back = EDMHeunScheduler.from_config(other.config)
    assert {name: back.config[name] for name in EDM_CHURN} == EDM_CHURN


@pytest.mark.parametrize(
    "scheduler_class, num_steps",
    [(EDMHeunScheduler, 30), (EDMEulerScheduler, 300), (EDMDPMSolverMultistepScheduler, 30)],
)
def test_every_edm_scheduler_samples_the_same_network_in_the_same_loop(scheduler_class, num_steps):
    scheduler = scheduler_class.from_config(EDMHeunScheduler().config)
    scheduler.set_timesteps(num_steps)
    x = scheduler.init_noise_sigma * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = gaussian_solution(x, 80.0)
    torch.testing.assert_close(sample(scheduler, gaussian_network, x), expected, atol=0.05, rtol=0)


# Bad input.


@pytest.mark.parametrize(
    "setting",
    [
        {"sigma_min": 0.0},
        {"sigma_max": 0.001},
        {"sigma_max": math.inf},
        {"sigma_data": -0.5},
        {"sigma_data": math.nan},
        {"sigma_schedule": "linear"},
        {"num_train_timesteps": 0},
        {"prediction_type": "sample"},
        {"rho": 0.0},
        {"s_churn": -1.0},
        {"s_tmin": -1.0},
        {"s_tmin": 2.0, "s_tmax": 1.0},
        {"s_noise": -1.0},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"Expected {list(setting)[-1]}"):
        EDMHeunScheduler(**setting)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 0},
        {"num_inference_steps": 2.5},
        {"num_inference_steps": 3, "sigmas": [2.0, 1.0]},
        {"sigmas": []},
        {"sigmas": [2.0, 1.0, 0.0]},
        {"sigmas": [1.0, 2.0]},
        {"sigmas": [2.0, 2.0]},
        {"sigmas": [math.inf, 1.0]},
        {"sigmas": [2.0, math.nan]},
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected (num_inference_steps|sigmas) to be"):
        EDMHeunScheduler().set_timesteps(**arguments)


def test_sampling_without_set_timesteps_is_refused():
    scheduler, x = EDMHeunScheduler(), torch.zeros(1, 1, 2, 2)
    t = scheduler.timesteps[0]
    for method, arguments in (("scale_model_input", (x, t)), ("step", (x, t, x)), ("set_begin_index", (0,))):
        with pytest.raises(ValueError, match="set_timesteps"):
            getattr(scheduler, method)(*arguments)


@pytest.mark.parametrize("timestep", [0, torch.tensor(0), torch.tensor([0.5, 0.5])], ids=str)
def test_timesteps_that_are_no_single_float_are_refused(timestep):
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="one of scheduler.timesteps"):
        prepared(3).step(x, timestep, x)


def test_steps_out_of_order_are_refused_and_change_nothing():
    scheduler, x = prepared(3), torch.zeros(1, 1, 2, 2)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"timesteps\[1\]"):
        scheduler.step(x, scheduler.timesteps[4], x)
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(x, t, x).prev_sample
    assert scheduler.step_index == 5
    with pytest.raises(ValueError, match="one more"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_run_cannot_start_at_a_corrector():
    scheduler, x = prepared(3, s_churn=1.0), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="even entry"):
        scheduler.step(x, scheduler.timesteps[1], x)
    for begin_index in (-2, 1, 6):
        with pytest.raises(ValueError, match="begin_index to be even"):
            scheduler.set_begin_index(begin_index)


def test_shapes_and_generators_that_do_not_match_are_refused():
    scheduler, x = prepared(3), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="the sample's shape"):
        scheduler.step(torch.zeros(2, 2, 2, 2), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="one generator per sample"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[torch.Generator()])


def test_add_noise_refuses_integer_timesteps():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="floating-point"):
        EDMHeunScheduler().add_noise(x, x, torch.tensor([3]))
