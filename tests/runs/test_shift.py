# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The shift "auto" of --objective_config, and the quarters of the loss by time."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_tread import FlowMatchingObjective
from diffusers_tread.runs import setup
from diffusers_tread.runs.config import TrainConfig
from diffusers_tread.runs.monitor import LossByTime


AUTO = TrainConfig(preset="S/2", objective_config='{"shift": "auto", "logit_std": 0.5}')


@pytest.mark.parametrize(
    ("channels", "latent_size", "sizes", "expected"),
    [
        (4, 32, [(256, 256)], 1.0),
        (768, 16, [(256, 256)], 6.928),  # RAE's latents (arXiv 2510.11690)
        (32, 16, [(256, 256)], 2**0.5),
        (16, 40, [(256, 256), (192, 320)], (16 * (32 * 32 + 24 * 40) / 2 / 4096) ** 0.5),  # buckets: the mean area
    ],
)
def test_the_shift_auto_follows_from_the_values_of_the_latents(channels, latent_size, sizes, expected):
    resolution = max(map(max, sizes))
    source = SimpleNamespace(channels=channels, latent_size=latent_size, resolution=resolution, sizes=sizes)
    objective = setup.make_objective(AUTO, source)
    assert objective == FlowMatchingObjective(shift=objective.shift, logit_std=0.5)
    assert objective.shift == pytest.approx(expected, rel=1e-4)
    assert objective.scheduler().config.shift == objective.shift


def test_the_shift_auto_needs_data_and_an_objective_with_a_shift():
    with pytest.raises(ValueError, match='a number for shift .* got "auto"'):
        setup.make_objective(AUTO, None)
    edm = TrainConfig(preset="S/2", objective="edm", objective_config='{"shift": "auto"}')
    source = SimpleNamespace(channels=4, latent_size=32, resolution=256, sizes=[(256, 256)])
    with pytest.raises(ValueError, match="Expected fields of EDMObjective"):
        setup.make_objective(edm, source)


def test_quarters_go_from_the_least_noise_to_the_most_and_start_anew():
    term = LossByTime.for_model(torch.nn.Linear(1, 1))
    for offset in (0.0, 2.0):
        error = torch.tensor([4.0, 1.0, 3.0, 2.0, 2.0])
        record = SimpleNamespace(
            timestep=torch.tensor([900.0, 1.0, 700.0, 300.0, 301.0]),
            prediction=(error + offset).view(5, 1, 1, 1).expand(5, 2, 3, 3).requires_grad_(),
            target=torch.zeros(5, 2, 3, 3),
        )
        added = term(record)
        assert torch.equal(added, torch.zeros(5)) and not added.requires_grad
    # Of five samples the first quarter has two: (1 + 4) / 2 and (9 + 16) / 2.
    assert term.read(Accelerator(cpu=True)) == {"loss_t0": 7.5, "loss_t1": 10.0, "loss_t2": 17.0, "loss_t3": 26.0}
    term(record)
    assert term.read(Accelerator(cpu=True))["loss_t3"] == 36.0
