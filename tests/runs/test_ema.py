# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_tread.runs.ema import update_ema


@pytest.fixture
def steps():
    """Three weights, float64, at the start and after each of 30 steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((7,), (3, 5), ())
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(31)]


def test_the_average_follows_its_formula_with_a_decay_that_warms_up(steps):
    ema, expected = EMAModel(steps[0], decay=0.7), steps[0]
    for step, weights in enumerate(steps[1:]):
        update_ema(ema, weights)
        decay = min((1 + step) / (10 + step), 0.7) if step > 0 else 0.0  # the first average is the weights
        expected = [decay * one + (1 - decay) * weight for one, weight in zip(expected, weights, strict=True)]
        assert ema.cur_decay_value == pytest.approx(decay) and ema.optimization_step == step + 1
        torch.testing.assert_close(ema.shadow_params, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("foreach", [False, True])
def test_the_average_is_the_one_of_diffusers_own_step_up_to_rounding(steps, foreach):
    ema = EMAModel([weight.float() for weight in steps[0]], decay=0.7, foreach=foreach)
    other, storages = copy.deepcopy(ema), [shadow.data_ptr() for shadow in ema.shadow_params]
    for weights in steps[1:]:
        weights = [torch.nn.Parameter(weight.float()) for weight in weights]
        before = copy.deepcopy(weights)
        update_ema(ema, weights)
        other.step(weights)
        torch.testing.assert_close(weights, before, rtol=0, atol=0)
    torch.testing.assert_close(ema.shadow_params, other.shadow_params, rtol=1e-6, atol=1e-6)
    assert ema.state_dict().keys() == other.state_dict().keys()
    assert ema.optimization_step == other.optimization_step and ema.cur_decay_value == other.cur_decay_value
    assert [shadow.data_ptr() for shadow in ema.shadow_params] == storages and not ema.shadow_params[0].requires_grad
