# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from accelerate import Accelerator

from diffusers_tread.runs.monitor import LossMonitor, check_weights


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_the_mean_is_over_the_steps_since_the_last_look(accelerator):
    monitor = LossMonitor(accelerator, step=10, samples_per_step=6)
    for loss in (1.0, 2.0, 6.0):
        monitor.add(torch.tensor(loss))
    loss, samples_per_second = monitor.read(13)
    assert loss == 3.0 and samples_per_second > 0
    monitor.add(torch.tensor(5.0))
    assert monitor.read(14)[0] == 5.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_one_loss_that_is_not_finite_is_noticed_later(accelerator, loss):
    monitor = LossMonitor(accelerator, step=0, samples_per_step=1)
    for value in (1.0, loss, 1.0):
        monitor.add(torch.tensor(value))
    with pytest.raises(ValueError, match="finite loss, got .* between steps 0 and 3"):
        monitor.read(3)


def test_one_weight_that_is_not_finite_is_noticed(accelerator):
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    check_weights(accelerator, weights, step=7)
    weights[1].data[1, 0] = math.nan
    with pytest.raises(ValueError, match="after step 7"):
        check_weights(accelerator, weights, step=7)
