# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""torch.compile: the same numbers, one graph, no recompilation from step to step.

The claims are about capture and gradients, so the quick "aot_eager" backend serves; one test goes through inductor.
"""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from diffusers_tread import RoutingCall, get_token_router, token_routing


# A shallow model is quick to compile.
pytestmark = pytest.mark.filterwarnings("ignore:The route ends at block")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def model(make_model):
    return make_model(num_layers=3, routes=[{"start": 0, "end": 0}]).train()


def output_and_gradients(model, forward, inputs):
    model.zero_grad()
    sample = forward(*inputs).sample
    sample.square().mean().backward()
    return sample.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "gradient_checkpointing, options", [(False, {}), (True, {"rejoin": "sum", "magnitude_mix": 0.5})]
)
def test_compiled_training_equals_eager_and_never_recompiles(
    model, make_model, inputs, gradient_checkpointing, options
):
    if options:
        routes = [{"start": 0, "end": 0, **options}, {"start": 2, "end": 2, "rejoin_from": 1}]
        routes.append({"start": 1, "end": 1, "rejoin": "fuse", "path_drop": 0.5})
        model = make_model(num_layers=5, routes=routes).train()
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    router, samples = get_token_router(compiled), []
    for seed in (1, torch.tensor(2), 2**61):
        router.defaults = RoutingCall(seed=seed)
        samples.append(output_and_gradients(model, compiled, inputs))
        torch.testing.assert_close(samples[-1], output_and_gradients(model, model, inputs), atol=1e-6, rtol=1e-5)
    assert not torch.equal(samples[0][0], samples[1][0])
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_seed_the_graph_draws_a_fresh_subset_each_step(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    samples = [compiled(*inputs).sample for _ in range(3)]
    assert not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])
    assert counters["stats"]["unique_graphs"] == 1
    torch.manual_seed(9)
    first = compiled(*inputs).sample
    torch.manual_seed(9)
    assert torch.equal(compiled(*inputs).sample, first)


def test_given_ids_compile_and_may_change_with_each_step(model, inputs):
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        ids = [torch.stack([torch.randperm(16)[:8].sort().values for _ in range(3)])]
        expected = model(*inputs, kept_token_ids=ids).sample
        torch.testing.assert_close(compiled(*inputs, kept_token_ids=ids).sample, expected, atol=1e-6, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_other_ratios_and_modes_are_graphs_of_their_own_and_right(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ratio in (0.5, 0.0):
            with token_routing(compiled, selection_ratio=ratio, seed=3):
                torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample, atol=1e-6, rtol=1e-5)
        graphs = counters["stats"]["unique_graphs"]
        with token_routing(compiled, selection_ratio=0.5, seed=4):
            compiled(*inputs)
    assert counters["stats"]["unique_graphs"] == graphs == 2


def test_repeated_blocks_share_their_graphs(make_model, inputs):
    model = make_model().train()
    expected = output_and_gradients(model, lambda *args: _seeded(model, args), inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found = output_and_gradients(model, lambda *args: _seeded(model, args), inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs < 6  # fewer than blocks: one per number of tokens, and one with a symbolic number
    _seeded(model, inputs, seed=8)
    assert counters["stats"]["unique_graphs"] == graphs


def _seeded(model, args, seed=3):
    with token_routing(model, seed=seed):
        return model(*args)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_numbers(make_model, inputs):
    model = make_model(num_layers=3, attention_head_dim=4, mlp_ratio=1.0, routes=[{"start": 0, "end": 0}]).train()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for seed in (1, 2):
            with token_routing(model, seed=seed):
                torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample, atol=1e-5, rtol=1e-4)
