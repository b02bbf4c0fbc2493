# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Routes of whole rows: what is kept, that its size is fixed, and what a model makes of it."""

import math

import pytest
import torch

from diffusers_tread import RoutingCall, TokenRoute, TokenRouter, TREADTransformer2DModel, default_route
from diffusers_tread.flops import forward_flops
from diffusers_tread.routing.subset import random_priority, select_kept_tokens, subset_hashes


GRID = HEIGHT, WIDTH = (10, 4)
TOKENS = torch.randn(3, HEIGHT * WIDTH, 6, generator=torch.Generator().manual_seed(0))


def plan(tokens=TOKENS, grid_size=GRID, route=None, **call):
    router = TokenRouter(TokenRoute(start=2, end=5, unit="row", **(route or {})), num_layers=12)
    given = router.plan(tokens, training=True, call=RoutingCall(**{"seed": 7, **call}), grid_size=grid_size)
    return None if given is None else given[0]


def rows_of(ids, width=WIDTH):
    """The kept rows, [B, h'], after a check that their tokens are all there and in raster order."""
    rows = ids.unflatten(1, (-1, width))
    assert torch.equal(rows, rows[..., :1] + torch.arange(width)) and (rows[..., 0] % width == 0).all()
    assert (ids.diff(dim=1) > 0).all()
    return rows[..., 0] // width


def test_the_unit_is_in_the_dictionary_only_where_it_is_said():
    assert TokenRoute(start=2, end=4, unit="token").to_dict() == {"start": 2, "end": 4, "selection_ratio": 0.5}
    route = default_route(12, unit="row")
    assert route.to_dict()["unit"] == "row" and TokenRoute(**route.to_dict()) == route
    assert default_route(12).unit == "token" and route.start == 2 and route.end == 8
    with pytest.raises(ValueError, match="unit 'token' or 'row', got 'column'"):
        TokenRoute(start=2, end=4, unit="column")


@pytest.mark.parametrize("ratio, num_rows", [(0.5, 5), (0.25, 8), (0.3, 7), (0.29, 8), (0.99, 1)])
def test_whole_rows_are_kept_chosen_like_as_many_tokens(ratio, num_rows):
    ids = plan(route={"selection_ratio": ratio})
    hashes = subset_hashes(torch.tensor(7), route_index=0, batch_size=3, num_tokens=HEIGHT)
    assert ids.dtype == torch.int64
    assert torch.equal(rows_of(ids), select_kept_tokens(random_priority(hashes), num_rows))


def test_every_row_is_kept_equally_often():
    rows = rows_of(plan(torch.empty(4096, HEIGHT * WIDTH, 1)))
    z = (torch.bincount(rows.flatten(), minlength=HEIGHT) - 4096 * 0.5) / math.sqrt(4096 * 0.25)
    assert 0.1 < z.abs().max() < 4.5


def test_all_fields_of_a_call_are_about_rows():
    assert plan(selection_ratio=0.0) is None and plan(selection_ratio=0.09) is None
    assert plan(selection_ratio=0.7).shape == (3, 3 * WIDTH)
    shared = plan(shared_subset=True)
    assert (shared == shared[:1]).all()

    # A sample with a seed of its own has its rows in every batch.
    seeds = torch.tensor([3, 1, 3])
    whole = plan(seed=seeds)
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
    assert torch.equal(plan(TOKENS[1:2], seed=seeds[1:2])[0], whole[1])

    # A row is as large as its tokens are on average.
    size = TOKENS.abs().sum(-1).unflatten(1, GRID).mean(-1)
    for mix, largest in ((1.0, True), (-1.0, False)):
        expected = size.topk(5, largest=largest).indices.sort(1).values
        assert torch.equal(rows_of(plan(magnitude_mix=mix)), expected)


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(40,), (3, 40)])
def test_a_forced_token_keeps_its_row(shape, mix):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.1
    rows = mask.unflatten(-1, GRID).any(-1).expand(3, -1)
    for ratio in (0.3, 0.9):
        kept = rows_of(plan(force_keep=mask, selection_ratio=ratio, magnitude_mix=mix))
        assert torch.zeros(3, HEIGHT, dtype=torch.bool).scatter(1, kept, True)[rows].all()
        assert kept.shape[1] == max(HEIGHT - int(HEIGHT * ratio), rows.sum(1).max())
    one_row = torch.arange(40) // WIDTH == 3
    assert plan(force_keep=one_row).shape == (3, 5 * WIDTH)  # four tokens, one row


def test_all_frames_of_a_video_keep_the_same_rows():
    video = torch.randn(3, 2 * HEIGHT * WIDTH, 6)
    ids = plan(video, (2, *GRID))
    first, second = ids.chunk(2, dim=1)
    assert torch.equal(first, plan()) and torch.equal(second, first + HEIGHT * WIDTH)
    mask = torch.zeros(2 * HEIGHT * WIDTH, dtype=torch.bool)
    mask[[3 * WIDTH, (HEIGHT + 8) * WIDTH + 1]] = True
    kept = rows_of(plan(video, (2, *GRID), force_keep=mask, selection_ratio=0.8).chunk(2, dim=1)[0])
    assert kept.tolist() == [[3, 8]] * 3
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    mask[:, 4:7] = True  # three rows in both frames are three, not six
    kept = rows_of(plan(video, (2, *GRID), force_keep=mask.flatten(), selection_ratio=0.8).chunk(2, dim=1)[0])
    assert kept.tolist() == [[4, 5, 6]] * 3
    size = video.abs().sum(-1).unflatten(1, (2, *GRID)).mean((1, 3))
    expected = size.topk(5).indices.sort(1).values
    assert torch.equal(rows_of(plan(video, (2, *GRID), magnitude_mix=1.0).chunk(2, dim=1)[0]), expected)


@pytest.mark.parametrize("grid_size", [None, (10, 5), (2, 10, 4)])
def test_rows_need_the_grid_of_the_tokens(grid_size):
    with pytest.raises(ValueError, match=r"grid of the 40 tokens.*got grid_size=.*unit='token'"):
        plan(grid_size=grid_size)


def make_model():
    torch.manual_seed(0)
    model = TREADTransformer2DModel(
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=8,
        routes=[default_route(6, unit="row")],
        sample_size=16,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


LATENTS, TIME = torch.randn(2, 4, 16, 12), torch.rand(2)


def test_a_model_gives_the_grid_of_its_latents_and_routed_rows_keep_their_bits():
    model = make_model()
    assert torch.equal(
        model(LATENTS, TIME, routing=RoutingCall(selection_ratio=0.0)).sample, model(LATENTS, TIME).sample
    )
    call = RoutingCall(enabled=True, seed=3)
    output = model(LATENTS, TIME, routing=call, hidden_states_at=(1, 2, 3))
    (ids,) = output.kept_token_ids
    rows = rows_of(ids, width=6)
    assert rows.shape == (2, 4)  # of 8x6 patches

    # The tokens that skip block 2 go into block 3 as they left block 1.
    seen = []
    model.transformer_blocks[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(LATENTS, TIME, routing=call)
    routed = torch.ones(2, 48, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(seen[0][routed], output.hidden_states[1][routed])
    assert not torch.equal(seen[0][~routed], output.hidden_states[1][~routed])


def test_a_compiled_plan_takes_new_seeds_without_recompiling():
    router = TokenRouter(TokenRoute(start=2, end=5, unit="row"), num_layers=12)

    def kept(tokens):
        return router.plan(tokens, training=True, grid_size=GRID)[0]

    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seed in (1, 2**61, -3):
        router.defaults = RoutingCall(seed=seed, force_keep=torch.arange(40) < 6)
        assert torch.equal(compiled(TOKENS), kept(TOKENS))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_flops_are_those_of_the_kept_rows():
    """Of nine rows five are kept, 30 of 54 tokens, where a route of tokens would keep 27."""
    model = make_model()
    inputs = {"hidden_states": torch.empty(1, 4, 18, 12), "timestep": torch.empty(1)}
    dense, routed = (forward_flops(model, inputs, selection_ratio=ratio).total for ratio in (0.0, None))
    width = 16
    per_token = 2 * width * (4 * width + 2 * 4 * width)  # q, k, v, out; two layers of four times the width
    attention = 4 * width * (54 * 54 - 30 * 30)
    assert dense - routed == (54 - 30) * per_token + attention
