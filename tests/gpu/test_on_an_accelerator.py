# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the CPU cannot tell: precisions, kernels, streams, CUDA graphs, and that nothing waits for the host."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch
from closeness import difference
from torch._dynamo.utils import counters

from diffusers_tread import (
    EDMHeunScheduler,
    FlowMatchingObjective,
    RoutingCall,
    SparseGuidance,
    TokenRoute,
    TREADPipeline,
    apply_token_routing,
    check_token_routing,
    token_routing,
)


pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The route ends at block")]
ROOT = Path(__file__).parents[2]
OBJECTIVE = FlowMatchingObjective()
SHALLOW = {"num_layers": 4, "routes": [{"start": 1, "end": 1}]}  # quick to compile


def loss_of(model, batch, *, seed):
    latents, labels = batch
    generator, routing = torch.Generator().manual_seed(5), RoutingCall(seed=seed)
    return OBJECTIVE.loss(model, latents, class_labels=labels, generator=generator, routing=routing).mean()


def loss_and_gradients(model, batch, *, dtype=None):
    model.zero_grad()
    device = batch[0].device
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss = loss_of(model, batch, seed=3)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


# Numbers.


def test_a_routed_step_has_the_cpu_s_loss_and_gradients(make_model, batch):
    model = make_model().train()
    expected = loss_and_gradients(copy.deepcopy(model).cpu(), [tensor.cpu() for tensor in batch])
    loss, gradients = loss_and_gradients(model, batch)
    assert difference([loss], [expected[0]]) < 1e-5
    assert difference(gradients, expected[1]) < 1e-4


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_a_routed_step_in_half_precision_is_near_that_in_float32(make_model, batch, dtype, limit):
    model = make_model().train()
    expected = loss_and_gradients(model, batch)
    loss, gradients = loss_and_gradients(model, batch, dtype=dtype)
    assert difference([loss], [expected[0]]) < limit
    assert difference(gradients, expected[1]) < limit


def test_two_routed_steps_give_the_same_bits(make_model, batch):
    model = make_model().train()
    first, second = loss_and_gradients(model, batch), loss_and_gradients(model, batch)
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use", ["whole", "blocks"])
def test_compiled_training_is_eager_training_without_recompilation(make_model, batch, use):
    torch._dynamo.reset()
    counters.clear()
    model = make_model(**SHALLOW).train()
    eager = copy.deepcopy(model)
    if use == "whole":
        model.compile(fullgraph=True, dynamic=False)
    else:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    for seed in (1, 2, 3):
        results = []
        for one in (model, eager):
            one.zero_grad()
            loss_of(one, batch, seed=seed).backward()
            results.append([parameter.grad for parameter in one.parameters()])
        assert difference(*results) < 1e-4
        if seed == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs


# Gradient checkpointing: autograd recomputes in a thread of its own.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointed_gradients_are_the_plain_ones(make_model, batch, dtype):
    model = make_model().train()
    expected = loss_and_gradients(model, batch, dtype=dtype)
    model.enable_gradient_checkpointing()
    loss, gradients = loss_and_gradients(model, batch, dtype=dtype)
    assert torch.equal(loss, expected[0])
    assert difference(gradients, expected[1]) < 1e-6


def flux(device):
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=4, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {
        "hidden_states": torch.randn(2, 64, 4), "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.rand(2),
        "img_ids": torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8], dim=1),
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model.to(device), {name: value.to(device) for name, value in inputs.items()}


def test_a_routed_flux_moves_positions_with_tokens_and_recomputes_the_same_subset(device):
    model, inputs = flux(device)
    apply_token_routing(model, TokenRoute(start=1, end=4))
    assert check_token_routing(model, **inputs) < 1e-4
    model.train()

    def gradients():
        model.zero_grad()
        with token_routing(model, seed=7):
            model(**inputs, return_dict=False)[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.enable_gradient_checkpointing()
    assert difference(gradients(), expected) < 1e-6


# Threads.


def test_requests_and_training_in_threads_share_a_model(make_model, batch):
    model = make_model().train()

    def request(seed):
        pipe = TREADPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(), guider=SparseGuidance())
        pipe.set_progress_bar_config(disable=True)
        return sample(pipe, [1, 2], [seed, seed + 1])

    expected, gradients = [request(seed) for seed in (5, 50)], loss_and_gradients(model, batch)[1]
    with ThreadPoolExecutor(3) as pool:
        images = [pool.submit(request, seed) for seed in (5, 50)]
        steps = [pool.submit(loss_and_gradients, model, batch) for _ in range(1)]
        for found, right in zip(images, expected, strict=True):
            assert torch.equal(found.result(), right)
        assert difference(steps[0].result()[1], gradients) < 1e-6


# Sampling.


def sample(pipe, labels, seeds, **changes):
    generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": 4, "generator": generators, "output_type": "latent"}
    return pipe(labels, **(settings | changes)).images


@pytest.mark.parametrize("scheduler", [EDMHeunScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_an_image_does_not_depend_on_the_batch_around_it(make_model, scheduler):
    model = make_model(objective="edm" if scheduler is EDMHeunScheduler else "flow").eval()
    pipe = TREADPipeline(model, scheduler(), guider=SparseGuidance())
    pipe.set_progress_bar_config(disable=True)
    together = sample(pipe, [1, 2, 3], [5, 6, 7])
    alone = torch.cat([sample(pipe, [label], [seed]) for label, seed in ((1, 5), (2, 6), (3, 7))])
    assert difference([together], [alone]) < 1e-4


def test_cuda_graphs_give_the_eager_images(make_model, cuda):
    torch._dynamo.reset()
    model = make_model(**SHALLOW).eval()
    pipe = TREADPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(), guider=SparseGuidance())
    pipe.set_progress_bar_config(disable=True)
    eager = sample(pipe, [1, 2], [5, 6])
    model.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
    for _ in range(3):  # the first calls warm up and record, later ones replay
        assert difference([sample(pipe, [1, 2], [5, 6])], [eager]) < 1e-4


def test_bfloat16_weights_sample_near_the_images_of_float32(make_model):
    model = make_model().eval()
    pipe = TREADPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(), guider=SparseGuidance())
    pipe.set_progress_bar_config(disable=True)
    expected = sample(pipe, [1, 2], [5, 6])
    pipe.to(torch.bfloat16)
    assert difference([sample(pipe, [1, 2], [5, 6])], [expected]) < 0.05


# Nothing waits for the host.


@pytest.fixture
def no_waiting(cuda):
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_never_waits(make_model, batch, no_waiting, cuda):
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    (latents, labels), generator = batch, torch.Generator(cuda)

    def step(seed):
        routing = RoutingCall(seed=seed)
        with torch.autocast("cuda", torch.bfloat16):
            generator.manual_seed(seed)
            loss = OBJECTIVE.loss(model, latents, class_labels=labels, generator=generator, routing=routing).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    no_waiting()
    step(1)


@pytest.mark.parametrize("guided", [False, True])
def test_a_sampling_step_never_waits(make_model, no_waiting, guided):
    guider = SparseGuidance() if guided else None
    pipe = TREADPipeline(make_model().eval(), diffusers.FlowMatchEulerDiscreteScheduler(), guider=guider)
    pipe.set_progress_bar_config(disable=True)
    switch = {0: no_waiting, 2: lambda: torch.cuda.set_sync_debug_mode("default")}

    def callback(pipe, step, timestep, tensors):
        switch.get(step, lambda: None)()
        return tensors

    sample(pipe, [1, 2], [5, 6], callback_on_step_end=callback)


# The script.


def test_a_run_that_is_cut_and_resumed_ends_with_the_same_weights(device, tmp_path):
    flags = ["--max_train_steps=12", "--checkpointing_steps=6", "--logging_steps=6", "--mixed_precision=bf16"]
    flags += ["--validation_steps=12", "--num_validation_images=4", "--train_batch_size=64"]
    environment = os.environ | {"ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}

    def run(folder, *more):
        command = [sys.executable, str(ROOT / "examples/train_tread.py"), f"--output_dir={tmp_path / folder}"]
        result = subprocess.run([*command, *flags, *more], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]

    run("whole")
    run("cut")
    for name in ("checkpoint-12", "pipeline", "samples"):
        (tmp_path / "cut" / name).rename(tmp_path / f"first-{name}")
    run("cut")
    manifests = [json.loads((tmp_path / run / "checkpoint-12/manifest.json").read_text()) for run in ("whole", "cut")]
    for name in ("model.safetensors", "ema.safetensors"):
        assert manifests[0][name] == manifests[1][name]
