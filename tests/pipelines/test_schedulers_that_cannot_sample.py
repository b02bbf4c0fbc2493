# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Schedulers that a pipeline refuses when it is made, because they would fail or give NaN when it samples."""

import diffusers
import pytest
import torch

from diffusers_tread import EDMHeunScheduler, TREADPipeline, TREADTransformer2DModel


FLOW_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
REFUSED = [
    # A network that would have to give variances as well.
    *[("epsilon", "DDPMScheduler", {"variance_type": kind}) for kind in ("learned", "learned_range")],
    *[("epsilon", "DPMSolverMultistepScheduler", {"variance_type": kind}) for kind in ("learned", "learned_range")],
    ("epsilon", "DPMSolverSinglestepScheduler", {"variance_type": "learned_range"}),
    ("epsilon", "SASolverScheduler", {"variance_type": "learned"}),
    ("flow", "DPMSolverMultistepScheduler", FLOW_SOLVER | {"variance_type": "learned_range"}),
    ("epsilon", "UnCLIPScheduler", {"variance_type": "learned_range"}),
    # A shift that depends on the size of the images, which nobody gives.
    ("flow", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("flow", "FlowMatchLCMScheduler", {"use_dynamic_shifting": True}),
    ("flow", "UniPCMultistepScheduler", FLOW_SOLVER | {"use_dynamic_shifting": True}),
    ("flow", "DEISMultistepScheduler", FLOW_SOLVER | {"use_dynamic_shifting": True}),
    # From the data to the noise.
    ("flow", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ("flow", "FlowMatchLCMScheduler", {"invert_sigmas": True}),
    ("epsilon", "DDIMInverseScheduler", {}),
    ("epsilon", "DPMSolverMultistepInverseScheduler", {}),
    # Noise levels that are none.
    ("epsilon", "DDIMScheduler", {"beta_end": 2.0}),
    ("epsilon", "EulerDiscreteScheduler", {"beta_start": float("nan")}),
    ("epsilon", "TCDScheduler", {"rescale_betas_zero_snr": True}),
    ("flow", "DPMSolverMultistepScheduler", FLOW_SOLVER | {"use_karras_sigmas": True}),
    ("flow", "DEISMultistepScheduler", FLOW_SOLVER | {"use_beta_sigmas": True}),
    ("edm", "EDMEulerScheduler", {"sigma_min": 0.0}),
    ("edm", "EDMDPMSolverMultistepScheduler", {"sigma_max": float("inf")}),
    # Other steps than the pipeline's.
    ("epsilon", "CogVideoXDPMScheduler", {}),
    ("edm", "SCMScheduler", {"prediction_type": "epsilon"}),
    ("flow", "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 100}),
    ("flow", "DPMSolverMultistepScheduler", FLOW_SOLVER | {"use_lu_lambdas": True}),
    # Other predictions than the network's.
    ("epsilon", "DDIMScheduler", {"prediction_type": "v_prediction"}),
    ("epsilon", "EulerDiscreteScheduler", {"prediction_type": "sample"}),
    ("edm", "EDMEulerScheduler", {"prediction_type": "v_prediction"}),
]
ACCEPTED = [
    *[("epsilon", "DDPMScheduler", {"variance_type": kind}) for kind in ("fixed_small", "fixed_small_log")],
    ("epsilon", "DDPMScheduler", {"variance_type": "fixed_large"}),
    ("epsilon", "DDIMScheduler", {"beta_schedule": "scaled_linear"}),
    ("epsilon", "PNDMScheduler", {}),
    ("epsilon", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("epsilon", "EulerAncestralDiscreteScheduler", {}),
    ("flow", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    ("flow", "FlowMatchHeunDiscreteScheduler", {}),
    ("flow", "UniPCMultistepScheduler", FLOW_SOLVER),
    ("edm", "EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ("edm", "EDMEulerScheduler", {"sigma_data": 1.0}),
]


def make_scheduler(name, settings):
    kind = getattr(diffusers, name, None) or pytest.skip(f"this diffusers has no {name}")
    try:
        return kind(**settings)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this diffusers refuses it: {error}")


def make_model(objective):
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    return TREADTransformer2DModel(**sizes, num_classes=3, objective=objective, routes=None)


@pytest.mark.parametrize(("objective", "name", "settings"), REFUSED)
def test_a_scheduler_that_cannot_sample_is_refused_when_the_pipeline_is_made(objective, name, settings):
    with pytest.raises(ValueError, match=rf"(?s)Expected a scheduler .* got {name}.* Use "):
        TREADPipeline(make_model(objective), make_scheduler(name, settings))


@pytest.mark.parametrize(("objective", "name", "settings"), ACCEPTED)
def test_others_are_accepted_and_sample(objective, name, settings):
    pipe = TREADPipeline(make_model(objective), make_scheduler(name, settings))
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=8, output_type="pt").images.isfinite().all()


def test_a_scheduler_that_takes_the_place_of_another_is_tried_as_well():
    pipe = TREADPipeline(make_model("flow"), diffusers.FlowMatchEulerDiscreteScheduler())
    before = pipe.scheduler
    with pytest.raises(ValueError, match="can sample, got .* with use_dynamic_shifting=True"):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert pipe.scheduler is before


@pytest.mark.parametrize("scheduler", [EDMHeunScheduler(s_churn=5.0), diffusers.EDMEulerScheduler()])
def test_the_trial_leaves_scheduler_and_random_numbers_as_they_are(scheduler):
    before = {name: str(value) for name, value in vars(scheduler).items()}
    torch.manual_seed(0)
    TREADPipeline(make_model("edm"), scheduler)
    drawn = torch.rand(1)
    assert {name: str(value) for name, value in vars(scheduler).items()} == before

    torch.manual_seed(0)
    make_model("edm")
    assert torch.equal(drawn, torch.rand(1))
