# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Rows of the grid on models of others: blocks that convolve get the kept rows as a smaller image."""

import pytest
import tiny_transformers
import torch

from diffusers_tread import (
    BlockSpec,
    ModelSpec,
    RoutingCall,
    TokenRoute,
    apply_token_routing,
    check_token_routing,
)
from diffusers_tread.hooks.specs import BLOCK_SPECS, MODEL_SPECS
from diffusers_tread.routing import take_tokens


ROUTE = TokenRoute(start=1, end=-4, unit="row")
CALL = RoutingCall(enabled=True, seed=4)


@torch.no_grad()
def test_sanas_blocks_run_on_the_image_of_the_kept_rows():
    """As if each block were called by hand on those rows: 3 of 6, of width 4."""
    case = tiny_transformers.build("SanaTransformer2DModel")
    router = apply_token_routing(case.model, ROUTE)
    calls = []
    for block in case.model.transformer_blocks[1:6]:
        block.register_forward_pre_hook(lambda module, args: calls.append(args))
    case.model(**case.inputs, routing=CALL)

    (ids,) = router.plan(calls[0][0], training=False, call=CALL, grid_size=(6, 4))
    tokens, (_, *arguments, height, width) = take_tokens(calls[0][0], ids), calls[0]
    assert (height, width, ids.shape) == (6, 4, (2, 12)) and not torch.equal(*ids)
    for block in case.model.transformer_blocks[1:5]:
        tokens = type(block).forward(block, tokens, *arguments, 3, 4)
    after = calls[4][0]  # what block 5 gets
    torch.testing.assert_close(take_tokens(after, ids), tokens)
    routed = torch.ones(2, 24, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(after[routed], calls[0][0][routed])


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, states, height, width, scale):
        image = states.transpose(1, 2).unflatten(2, (height, width))
        return states + scale * self.conv(image).flatten(2).transpose(1, 2)


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Convolution() for _ in range(4))

    def forward(self, image):
        states, scale = image.flatten(2).transpose(1, 2), torch.linspace(0, 1, image[0, 0].numel()).view(1, -1, 1)
        for block in self.blocks:
            states = block(states, *image.shape[2:], scale)
        return (states,)


@pytest.fixture
def convolutions(monkeypatch):
    spec = BlockSpec(hidden="states", tokens={"scale": 1}, num_rows="height")
    monkeypatch.setitem(BLOCK_SPECS, "Convolution", spec)
    grid = ModelSpec(grid=lambda model, arguments: arguments["image"].shape[2:])
    monkeypatch.setitem(MODEL_SPECS, "Convolutions", grid)
    torch.manual_seed(0)
    return Convolutions().eval()


IMAGE = torch.randn(2, 4, 8, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore:The route ends at block 1 of 4")
@torch.no_grad()
def test_a_row_between_its_own_neighbours_is_as_without_routing(convolutions):
    router = apply_token_routing(convolutions, TokenRoute(start=1, end=1, selection_ratio=0.25, unit="row"))
    seen = {}
    for name, call in (("dense", RoutingCall(enabled=False)), ("routed", CALL)):
        handle = convolutions.blocks[1].register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
        convolutions(IMAGE, routing=call)
        handle.remove()
    (ids,) = router.plan(seen["dense"], training=False, call=CALL, grid_size=(8, 5))
    for sample, rows in enumerate(ids[:, ::5] // 5):
        kept = set(rows.tolist()) | {-1, 8}  # beyond the border there is as little as before
        same = [row for row in range(8) if {row - 1, row, row + 1} <= kept]
        differs = (seen["dense"] != seen["routed"])[sample].unflatten(0, (8, 5)).any(2)  # h w
        assert same and not differs[same].any()
        assert differs[[row for row in range(8) if row not in same]].all()


def test_the_check_sees_what_convolving_blocks_do_not_gather(convolutions, monkeypatch):
    route = TokenRoute(start=0, end=0, unit="row")
    apply_token_routing(convolutions, route)
    assert check_token_routing(convolutions, image=IMAGE) < 1e-5
    with pytest.raises(ValueError, match="at least six rows of tokens .*got 5"):
        check_token_routing(convolutions, image=IMAGE[:, :, :5])

    monkeypatch.setitem(BLOCK_SPECS, "Convolution", BlockSpec(hidden="states", num_rows="height"))
    other = Convolutions().eval()
    apply_token_routing(other, route)
    with pytest.raises(ValueError, match=r"not gathered in \['Convolution'\]"):
        check_token_routing(other, image=IMAGE)


def test_one_graph_serves_all_seeds(convolutions):
    apply_token_routing(convolutions, TokenRoute(start=0, end=0, unit="row"))
    compiled = torch.compile(convolutions, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seed in (1, 2**61):
        call = RoutingCall(enabled=True, seed=seed)
        torch.testing.assert_close(compiled(IMAGE, routing=call)[0], convolutions(IMAGE, routing=call)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("name", "route", "message"),
    [
        ("SanaTransformer2DModel", {"start": 1, "end": 4}, r"unit='row' in .*SanaTransformerBlock works on the grid"),
        (
            "FluxTransformer2DModel",
            {"start": 1, "end": 4, "unit": "row"},
            "unit='token' in .*nothing in its arguments",
        ),
    ],
)
def test_a_unit_that_does_not_go_with_the_model_is_refused(name, route, message):
    model = tiny_transformers.build(name).model
    with pytest.raises(ValueError, match=message):
        apply_token_routing(model, route)
    assert "forward" not in model.__dict__


def test_a_magnitude_mix_is_that_of_rows():
    case = tiny_transformers.build("SanaVideoTransformer3DModel")
    apply_token_routing(case.model, ROUTE)
    seen = []
    case.model.transformer_blocks[1].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    case.model(**case.inputs, routing=RoutingCall(enabled=True, magnitude_mix=1.0))
    ((before, after),) = seen
    kept = (before != after).any(2).unflatten(1, (2, 6, 2)).all(3)  # B F h
    size = before.abs().sum(2).unflatten(1, (2, 6, 2)).mean((1, 3))  # B h
    assert all(
        kept[sample, frame].nonzero().flatten().tolist() == sorted(size[sample].topk(3).indices.tolist())
        for sample in range(2)
        for frame in range(2)
    )
