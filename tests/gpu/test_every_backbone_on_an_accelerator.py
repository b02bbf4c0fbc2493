# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Each backbone's routed step on the accelerator: the CPU's numbers, half precision, compiled blocks, no waiting."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from closeness import difference

from diffusers_tread import FlowMatchingObjective, RoutingCall
from diffusers_tread.runs.config import TrainConfig
from diffusers_tread.runs.optimizers import make_optimizer


sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from backbones import BACKBONES, make_backbone  # noqa: E402


pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The route ends at block")]
OBJECTIVE = FlowMatchingObjective()


def loss_of(model, *, seed=3):
    generator = torch.Generator().manual_seed(5)
    latents, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
    loss = OBJECTIVE.loss(
        model, latents.to(model.device), class_labels=labels.to(model.device), generator=generator,
        routing=RoutingCall(seed=seed),
    )  # fmt: skip
    return loss.mean()


def gradients_of(model, *, dtype=None):
    model.zero_grad()
    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        loss = loss_of(model)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_routed_step_has_the_cpu_s_gradients_and_half_precision_is_near(name, device):
    model = make_backbone(name).train()
    expected = gradients_of(model)
    model.to(device)
    assert difference(gradients_of(model), expected) < 1e-4
    assert difference(gradients_of(model, dtype=torch.bfloat16), expected) < 0.1


@pytest.mark.parametrize("name", BACKBONES)
def test_compiled_blocks_train_as_eager_ones(name, device):
    torch._dynamo.reset()
    eager = make_backbone(name).train().to(device)
    compiled = copy.deepcopy(eager)
    compiled.compile_repeated_blocks(dynamic=False)
    assert difference(gradients_of(compiled), gradients_of(eager)) < 1e-4


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon"))])  # fmt: skip
def test_a_step_of_the_optimiser_is_the_cpu_s(name, optimizer, device):
    model = make_backbone(name).train()
    config = TrainConfig(preset="S/2", optimizer=optimizer, learning_rate=1e-3, adam_epsilon=1e-3)
    results = []
    for one in (model, copy.deepcopy(model).to(device)):
        before = [parameter.detach().clone() for parameter in one.parameters()]
        stepping = make_optimizer(config, one)
        loss_of(one).backward()
        stepping.step()
        results.append([after - first for after, first in zip(one.parameters(), before, strict=True)])
    # Muon multiplies in bfloat16.
    assert difference(results[1], results[0]) < (0.05 if optimizer == "muon" else 1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_never_waits(name, device):
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    model = make_backbone(name).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    latents, labels = torch.randn(4, 3, 8, 8, device=device), torch.arange(4, device=device)
    generator = torch.Generator(device)

    def step(seed):
        generator.manual_seed(seed)
        routing = RoutingCall(seed=seed)
        with torch.autocast("cuda", torch.bfloat16):
            loss = OBJECTIVE.loss(model, latents, class_labels=labels, generator=generator, routing=routing)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
