# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A forward that goes on from another one's prefix gives the bits of a whole forward."""

import weakref

import pytest
import torch

from diffusers_tread import token_routing


ROUTES = {
    "state": [{"start": 2, "end": 3}],
    "input": [{"start": 2, "end": 3, "rejoin": "input"}],
    "sum": [{"start": 2, "end": 3, "rejoin": "sum"}],
    "magnitude": [{"start": 2, "end": 3, "magnitude_mix": 0.5}],
    "two": [{"start": 1, "end": 2}, {"start": 4, "end": 4, "rejoin": "sum"}],
    "from the first block": [{"start": 0, "end": 1, "rejoin": "input"}],
    "delayed": [{"start": 2, "end": 3, "rejoin_from": 1}],
    "delayed to the input": [{"start": 2, "end": 3, "rejoin_from": 0}],
    "fused": [{"start": 2, "end": 3, "rejoin": "fuse"}, {"start": 4, "end": 5, "rejoin": "fuse"}],
    "two delayed": [{"start": 3, "end": 3, "rejoin_from": 2}, {"start": 4, "end": 4, "rejoin_from": 1}],
    "delayed to between": [{"start": 1, "end": 2}, {"start": 4, "end": 4, "rejoin_from": 3}],
}
WIDTHS = {"delayed": 32, "two delayed": 48}
"""Of the prefix: the tokens' 16 channels, and as many for each earlier state that lies in it."""


@pytest.fixture
def make_routed(make_model):
    return lambda kind: make_model(num_layers=8, routes=ROUTES[kind]).eval()


def run(model, inputs, ratio, **settings):
    """One routed forward, and how often each block ran."""
    ran = []
    hooks = [block.register_forward_hook(lambda block, *_: ran.append(block)) for block in model.transformer_blocks]
    with torch.no_grad(), token_routing(model, selection_ratio=ratio, seed=3):
        output = model(*inputs, **settings)
    for hook in hooks:
        hook.remove()
    return output, [ran.count(block) for block in model.transformer_blocks]


@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("ratios", [(0.25, 0.75), (0.0, 0.75), (0.5, 0.0)], ids=str)
def test_a_forward_that_goes_on_from_a_prefix_has_the_same_bits(make_routed, inputs, kind, ratios):
    model, start = make_routed(kind), ROUTES[kind][0]["start"]
    strong, counts = run(model, inputs, ratios[0], return_prefix=True)
    assert counts == [1] * 8 and strong.prefix.shape == (3, 16, WIDTHS.get(kind, 16))
    assert torch.equal(strong.sample, run(model, inputs, ratios[0])[0].sample)

    weak, counts = run(model, inputs, ratios[1], prefix=strong.prefix)
    expected = run(model, inputs, ratios[1])[0]
    assert counts == [0] * start + [1] * (8 - start)
    assert torch.equal(weak.sample, expected.sample) and weak.prefix is None
    assert not torch.equal(weak.sample, strong.sample)
    if expected.kept_token_ids is not None:
        torch.testing.assert_close(weak.kept_token_ids, expected.kept_token_ids, rtol=0, atol=0)


def test_the_prefix_is_what_the_first_routed_block_would_see_of_all_tokens(make_routed, inputs):
    model, seen = make_routed("state"), []
    model.transformer_blocks[2].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    dense, routed = (run(model, inputs, ratio, return_prefix=True)[0] for ratio in (0.0, 0.5))
    assert torch.equal(dense.prefix, seen[0]) and torch.equal(routed.prefix, seen[0])

    # Given on, it stays as it is.
    again = run(model, inputs, 0.5, prefix=routed.prefix, return_prefix=True)[0]
    assert torch.equal(again.prefix, seen[0])


def test_an_earlier_state_is_held_only_where_it_is_asked_for(make_routed, inputs):
    model, states, is_held = make_routed("delayed"), [], []
    blocks = model.transformer_blocks
    blocks[1].register_forward_pre_hook(lambda block, args: states.append(weakref.ref(args[0])))
    blocks[4].register_forward_pre_hook(lambda block, args: is_held.append(states[-1]() is not None))
    for ratio, asked in ((0.0, False), (0.5, False), (0.0, True)):
        run(model, inputs, ratio, return_prefix=asked)
    assert is_held == [False, True, True]


def test_a_tuple_has_the_prefix_last_and_only_if_asked_for(make_routed, inputs):
    model = make_routed("state")
    for ratio, length in ((0.0, 1), (0.5, 2)):
        assert len(run(model, inputs, ratio, return_dict=False)[0]) == length
        asked, _ = run(model, inputs, ratio, return_dict=False, return_prefix=True)
        assert len(asked) == length + 1 and asked[-1].shape == (3, 16, 16)


@pytest.mark.parametrize("kind, gradient_checkpointing", [("sum", False), ("sum", True), ("two delayed", True)])
def test_gradients_flow_through_the_prefix(make_routed, inputs, kind, gradient_checkpointing):
    model = make_routed(kind).train()
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()

    def gradients(second):
        model.zero_grad()
        with token_routing(model, seed=3):
            first = model(*inputs, return_prefix=True)
        with token_routing(model, seed=4):
            (first.sample - second(first.prefix)).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(lambda prefix: model(*inputs).sample)
    found = gradients(lambda prefix: model(*inputs, prefix=prefix).sample)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 15, 16), (3, 16, 8), (3, 16)])
def test_a_prefix_of_another_shape_is_refused(make_routed, inputs, shape):
    with pytest.raises(ValueError, match=r"Expected a prefix \[3, 16, 16\], as return_prefix=True .* got \["):
        make_routed("state")(*inputs, prefix=torch.zeros(shape))


@pytest.mark.parametrize("settings", [{"prefix": torch.zeros(3, 16, 16)}, {"return_prefix": True}], ids=["in", "out"])
def test_a_model_without_routes_has_no_prefix(make_model, inputs, settings):
    with pytest.raises(ValueError, match="Expected a model with routes for a prefix, got routes=None"):
        make_model(routes=None)(*inputs, **settings)
