# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The model against DiT's and TREAD's formulas, written again in numpy, and its routes."""

import copy
import doctest
import functools
import importlib
import warnings

import numpy as np
import pytest
import torch
from closeness import assert_same_gradients
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch.utils.checkpoint import checkpoint

from diffusers_tread import RoutingCall, TokenRoute, TREADTransformer2DModel, get_token_router, token_routing
from diffusers_tread.models.latent_denoiser import sincos_positions


# The forward in numpy, float64, from arXiv 2212.09748 (DiT) and 2501.04765 (TREAD).


def numpy_forward(model, latents, timestep, labels, kept_token_ids=()):
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    latents, patch, width = latents.double().numpy(), config.patch_size, w["patch_embedding.bias"].size
    batch, channels, height, wide = latents.shape
    rows, columns = height // patch, wide // patch

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    # Patches and positions.
    cut = latents.reshape(batch, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
    x = cut.reshape(batch, rows * columns, -1) @ w["patch_embedding.weight"].reshape(width, -1).T
    x = x + w["patch_embedding.bias"]
    base, quarter = config.sample_size // patch, width // 4
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                frequency = 10000 ** (-k / quarter)
                across, down = column * base / columns * frequency, row * base / rows * frequency
                x[:, row * columns + column, k] += np.sin(across)
                x[:, row * columns + column, k + quarter] += np.cos(across)
                x[:, row * columns + column, k + 2 * quarter] += np.sin(down)
                x[:, row * columns + column, k + 3 * quarter] += np.cos(down)

    # Time and class.
    angles = config.timestep_scale * timestep.double().numpy()[:, None] * 10000 ** (-np.arange(128) / 128)
    time = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    time = linear(silu(linear(time, "timestep_embedding.linear_1")), "timestep_embedding.linear_2")
    condition = silu(time + w["class_embedding.weight"][labels.numpy()])

    # Blocks, where the kept tokens leave the sequence before the route's start and come back after its end. A routed
    # token comes back as the state it had, as its input to the network, or as their sum, or as an earlier state.
    x_input, x_before = x, []
    for index in range(config.num_layers):
        x_before.append(x)
        for route, ids in zip(config.routes or [], kept_token_ids, strict=False):
            if index == route["start"]:
                everything = {"state": x, "input": x_input, "sum": x + x_input}[route.get("rejoin", "state")].copy()
                everything = x_before[route["rejoin_from"]].copy() if "rejoin_from" in route else everything
                x = np.stack([x[b, ids[b].numpy()] for b in range(batch)])
        name = f"transformer_blocks.{index}"
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(condition, f"{name}.modulation"), 6, 1)
        y = norm(x) * (1 + scale1[:, None]) + shift1[:, None]
        q, k, v = (
            part.reshape(batch, y.shape[1], config.num_attention_heads, -1)
            for part in np.split(linear(y, f"{name}.attn.to_qkv"), 3, 2)
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.attention_head_dim)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(y.shape)
        x = x + gate1[:, None] * linear(attended, f"{name}.attn.to_out.0")
        y = linear(norm(x) * (1 + scale2[:, None]) + shift2[:, None], f"{name}.ff.net.0.proj")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + gate2[:, None] * linear(y, f"{name}.ff.net.2")
        for route, ids in zip(config.routes or [], kept_token_ids, strict=False):
            if index == route["end"]:
                for b in range(batch):
                    everything[b, ids[b].numpy()] = x[b]
                x = everything

    # Output.
    shift, scale = np.split(linear(condition, "modulation_out"), 2, 1)
    out = linear(norm(x) * (1 + scale[:, None]) + shift[:, None], "proj_out")
    out = out.reshape(batch, rows, columns, patch, patch, -1).transpose(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, -1, height, wide)


def assert_close(sample, expected):
    np.testing.assert_allclose(sample.detach().numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "changes, size",
    [
        ({}, (8, 8)),
        ({}, (4, 12)),
        ({}, (10, 6)),
        ({"patch_size": 1}, (8, 8)),
        ({"patch_size": 4, "out_channels": 5, "timestep_scale": 10.0}, (8, 16)),
        ({"num_attention_heads": 1, "attention_head_dim": 12, "mlp_ratio": 2.0}, (8, 8)),
    ],
)
def test_the_dense_forward_equals_the_formulas(make_model, changes, size):
    model = make_model(**changes).eval()
    latents, timestep, labels = torch.randn(3, 3, *size), torch.randn(3), torch.tensor([0, 5, 2])
    assert_close(model(latents, timestep, labels).sample, numpy_forward(model, latents, timestep, labels))


def random_ids(*sizes):
    return [torch.stack([torch.randperm(16)[:size].sort().values for _ in range(3)]) for size in sizes]


@pytest.mark.parametrize("training", [False, True])
def test_the_routed_forward_equals_the_formulas(make_model, inputs, training):
    model = make_model(num_layers=8, routes=[{"start": 1, "end": 2}, {"start": 4, "end": 4}]).train(training)
    ids = random_ids(9, 3)
    expected = numpy_forward(model, *inputs, ids)
    assert_close(model(*inputs, kept_token_ids=ids).sample, expected)
    assert np.abs(expected - numpy_forward(model, *inputs)).max() > 1e-3


@pytest.mark.parametrize("rejoins", [("state", "input"), ("input", "sum"), ("sum", "state")])
def test_tokens_rejoin_as_their_routes_say(make_model, inputs, rejoins):
    """Routes in direct sequence, the second with the first's routed tokens among its own."""
    spans = [{"start": 0, "end": 1}, {"start": 2, "end": 4}]
    model = make_model(num_layers=8, routes=[{**span, "rejoin": r} for span, r in zip(spans, rejoins, strict=True)])
    ids = random_ids(5, 11)
    expected = numpy_forward(model, *inputs, ids)
    assert_close(model(*inputs, kept_token_ids=ids).sample, expected)

    plain = make_model(num_layers=8, routes=spans)
    assert np.abs(expected - numpy_forward(plain, *inputs, ids)).max() > 1e-3
    assert torch.equal(model.eval()(*inputs).sample, plain.eval()(*inputs).sample)  # dense


@pytest.mark.parametrize("rejoins", [(1, None), (None, 0), (1, 2), (0, 4)])
def test_tokens_of_delayed_routes_rejoin_in_the_state_they_had_before_that_block(make_model, inputs, rejoins):
    """The second route's from before the first (1, 0), from where that begins (2), or from behind it (4)."""
    spans = [{"start": 2, "end": 3}, {"start": 5, "end": 6}]
    routes = [s | ({} if r is None else {"rejoin_from": r}) for s, r in zip(spans, rejoins, strict=True)]
    model = make_model(num_layers=10, routes=routes)
    ids = random_ids(5, 11)
    assert_close(model(*inputs, kept_token_ids=ids).sample, numpy_forward(model, *inputs, ids))


@pytest.mark.parametrize("rejoin", ["input", "sum"])
def test_the_gradient_takes_every_way_back_to_the_input(make_model, inputs, rejoin):
    """At finite differences, with and without checkpoints."""
    model = make_model(num_layers=5, routes=[{"start": 0, "end": 1, "rejoin": rejoin}]).double().train()
    ids, gradients = random_ids(4), []
    bias = model.patch_embedding.bias
    inputs = (inputs[0].double(), *inputs[1:])

    def loss():
        return model(*inputs, kept_token_ids=ids).sample.square().mean()

    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss(), bias)
        gradients.append(gradient)
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)

    direction, step = torch.randn_like(bias), 1e-5
    with torch.no_grad():
        bias += step * direction
        above = loss()
        bias -= 2 * step * direction
        below = loss()
    torch.testing.assert_close((above - below) / (2 * step), gradients[0] @ direction, rtol=1e-5, atol=0)


def test_the_router_decides_when_no_ids_are_given(make_model, inputs):
    model = make_model().train()
    router = get_token_router(model)
    router.defaults = RoutingCall(seed=3)
    ids = router.plan(torch.empty(3, 16, 1), training=True)
    assert ids[0].shape == (3, 8)
    assert_close(model(*inputs).sample, numpy_forward(model, *inputs, ids))


def test_a_route_not_taken_is_given_as_none(make_model, inputs):
    model = make_model(num_layers=8, routes=[{"start": 1, "end": 2}, {"start": 4, "end": 4}]).eval()
    ids = torch.arange(4).expand(3, 4)
    alone = make_model(num_layers=8, routes=[{"start": 4, "end": 4}]).eval()
    assert torch.equal(model(*inputs, kept_token_ids=[None, ids]).sample, alone(*inputs, kept_token_ids=[ids]).sample)
    assert torch.equal(model(*inputs, kept_token_ids=[None, None]).sample, model(*inputs).sample)


def test_the_output_tells_which_tokens_were_kept(make_model, inputs):
    model = make_model(num_layers=8, routes=[{"start": 1, "end": 2}, {"start": 4, "end": 4}]).train()
    output = model(*inputs)
    again = model(*inputs, kept_token_ids=output.kept_token_ids, return_dict=False)
    assert torch.equal(again[0], output.sample) and again[1] is output.kept_token_ids
    assert [ids.shape for ids in output.kept_token_ids] == [(3, 8), (3, 8)]

    dense = model.eval()(*inputs)
    assert dense.kept_token_ids is None and len(model(*inputs, return_dict=False)) == 1


def test_a_magnitude_in_a_route_measures_the_tokens_at_the_input(make_model, inputs):
    model = make_model(routes=[{"start": 1, "end": 2, "magnitude_mix": 1.0}]).train()
    tokens, _ = recorded_tokens(model, lambda: model(*inputs))[0]
    assert torch.equal(model(*inputs).kept_token_ids[0], tokens.abs().sum(2).topk(8).indices.sort(1).values)


@pytest.mark.parametrize("size", [(4, 4), (4, 6), (3, 8), (16, 16)])
def test_positions_are_those_of_diffusers_and_of_the_formula_to_the_last_bit(size):
    found = sincos_positions(16, *size, base=4)
    assert torch.equal(found, get_2d_sincos_pos_embed(16, size, base_size=4, output_type="pt").float())

    # MAE's formula in float64: half of the channels for the column, half for the row, each sines, then cosines.
    omega = 10000.0 ** (-np.arange(4) / 4)
    table = []
    for row in range(size[0]):
        for column in range(size[1]):
            # The coordinates themselves are float32 in diffusers.
            x, y = np.float32(column) / np.float32(size[1] / 4), np.float32(row) / np.float32(size[0] / 4)
            angles = [np.float64(x) * omega, np.float64(y) * omega]
            table.append(np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))]))
    np.testing.assert_allclose(found.numpy(), np.array(table), rtol=0, atol=6e-8)  # half a unit of the last place of 1


# Initialisation and size.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routes", [None, "default"])
def test_the_output_is_exactly_zero_at_initialisation(inputs, training, routes):
    model = TREADTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=6, in_channels=3, num_classes=5, routes=routes
    ).train(training)
    assert torch.count_nonzero(model(*inputs).sample) == 0
    assert all(torch.count_nonzero(block.attn.to_qkv.weight) > 0 for block in model.transformer_blocks)


def test_query_key_and_value_are_initialised_as_one_matrix():
    """As in DiT: Xavier's bound sqrt(6 / (fan_in + fan_out)) of a [3D, D] matrix is sqrt(1.5 / D)."""
    model = TREADTransformer2DModel(num_attention_heads=4, attention_head_dim=16, num_layers=6)
    for block in model.transformer_blocks:
        weight = block.attn.to_qkv.weight
        assert 0.95 * (1.5 / 64) ** 0.5 < weight.abs().max() <= (1.5 / 64) ** 0.5
        assert weight.std().item() == pytest.approx((0.5 / 64) ** 0.5, rel=0.03)


def test_every_parameter_gets_a_gradient(make_model, inputs):
    model = make_model().train()
    model(*inputs).sample.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "preset, dim, depth, heads, millions",
    [("S", 384, 12, 6, 33), ("B", 768, 12, 12, 130), ("L", 1024, 24, 16, 458), ("XL", 1152, 28, 16, 675)],
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets_have_dits_size(preset, dim, depth, heads, millions, patch):
    with torch.device("meta"):
        model = TREADTransformer2DModel.from_preset(f"{preset}/{patch}")
    config = model.config
    assert (config.num_attention_heads, config.num_layers, config.patch_size) == (heads, depth, patch)
    assert config.num_attention_heads * config.attention_head_dim == dim
    assert config.routes == [{"start": 2, "end": depth - 4, "selection_ratio": 0.5}]

    def linear(inner, outer):
        return inner * outer + outer

    block = 4 * linear(dim, dim) + linear(dim, 4 * dim) + linear(4 * dim, dim) + linear(dim, 6 * dim)
    ends = linear(4 * patch**2, dim) + linear(dim, 2 * dim) + linear(dim, 4 * patch**2)
    conditioning = linear(256, dim) + linear(dim, dim) + 1001 * dim
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == depth * block + ends + conditioning
    if patch == 2:
        assert round(count / 1e6) == millions


def test_a_preset_takes_what_the_data_need():
    model = TREADTransformer2DModel.from_preset(
        "S/8", sample_size=16, in_channels=1, num_classes=2, routes=None, timestep_scale=2.0, objective="flow"
    )
    config = model.config
    assert (config.sample_size, config.in_channels, config.num_classes) == (16, 1, 2)
    assert (config.routes, config.timestep_scale, config.objective) == (None, 2.0, "flow")


@pytest.mark.parametrize("preset", ["S", "s/2", "XL/3", "M/2", "S/2/2", "", None])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(ValueError, match=r"Expected a preset among \['S/2', 'S/4', 'S/8', 'B/2'"):
        TREADTransformer2DModel.from_preset(preset)


# Routes.


def recorded_tokens(model, run):
    """Each block's input and output."""
    calls = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
        for block in model.transformer_blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def test_routed_tokens_keep_every_bit_across_the_route(make_model, inputs):
    model = make_model(num_layers=8, routes=[{"start": 2, "end": 4, "selection_ratio": 0.75}]).train()
    router = get_token_router(model)
    router.defaults = RoutingCall(seed=7)
    (ids,) = router.plan(torch.empty(3, 16, 1), training=True)
    calls = recorded_tokens(model, lambda: model(*inputs))

    assert [hidden_states.shape[1] for hidden_states, _ in calls] == [16, 16, 4, 4, 4, 16, 16, 16]
    before, inside, after = calls[1][1], calls[4][1], calls[5][0]
    for sample in range(3):
        kept = ids[sample].tolist()
        routed = sorted(set(range(16)) - set(kept))
        assert torch.equal(calls[2][0][sample], before[sample, kept])
        assert torch.equal(after[sample, kept], inside[sample])
        assert torch.equal(after[sample, routed].view(torch.int32), before[sample, routed].view(torch.int32))


def test_ratio_zero_is_bitwise_dense(make_model, inputs):
    model = make_model()
    dense = make_model(routes=None)(*inputs).sample
    assert torch.equal(model.eval()(*inputs).sample, dense)
    model.train()
    with token_routing(model, selection_ratio=0.0):
        assert torch.equal(model(*inputs).sample, dense)
    with token_routing(model, enabled=False):
        assert torch.equal(model(*inputs).sample, dense)
    assert torch.equal(make_model(routes=[{"start": 1, "end": 2, "selection_ratio": 0.0}])(*inputs).sample, dense)
    assert not torch.equal(model(*inputs).sample, dense)


def test_evaluation_is_dense_unless_a_ratio_is_asked_for(model, inputs):
    dense = model(*inputs).sample
    with token_routing(model, selection_ratio=0.5, seed=1):
        assert not torch.equal(model(*inputs).sample, dense)
    assert torch.equal(model(*inputs).sample, dense)


def test_training_draws_a_fresh_subset_at_every_forward(make_model, inputs):
    model = make_model().train()
    assert not torch.equal(model(*inputs).sample, model(*inputs).sample)
    with token_routing(model, seed=4):
        assert torch.equal(model(*inputs).sample, model(*inputs).sample)


def test_the_sample_of_a_batch_equals_the_sample_alone(make_model, inputs):
    model, (latents, timestep, labels) = make_model().train(), inputs
    with token_routing(model, seed=torch.tensor([4, 5, 6])):
        whole = model(latents, timestep, labels).sample
    with token_routing(model, seed=torch.tensor([5])):
        alone = model(latents[1:2], timestep[1:2], labels[1:2]).sample
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=0)


def test_routes_are_kept_in_the_config_as_plain_absolute_values(make_model):
    routes = [TokenRoute(start=4, end=-4), {"start": 0, "end": 1, "selection_ratio": 0.25}]
    config = make_model(num_layers=9, routes=routes).config
    assert config.routes == [
        {"start": 0, "end": 1, "selection_ratio": 0.25},
        {"start": 4, "end": 5, "selection_ratio": 0.5},
    ]
    options = {"start": 1, "end": 2, "selection_ratio": 0.5, "rejoin": "sum", "magnitude_mix": -0.5}
    assert make_model(routes=[TokenRoute(**options)]).config.routes == [options]
    assert [type(route) for route in routes] == [TokenRoute, dict]


@pytest.mark.parametrize(
    "routes, message",
    [
        ([{"start": 2, "end": 9}], "inside the model's 6 blocks"),
        ([{"start": 0, "end": 2}, {"start": 2, "end": 2}], "do not overlap"),
        ([{"start": 1, "end": 4}], "at least two blocks"),
        ([{"start": 2, "end": 1}], "empty route"),
        ([{"start": 1, "end": 2, "selection_ratio": 1.0}], "selection ratio"),
        ([{"start": 1, "end": 2, "rejoin": "x_T"}], "Expected rejoin 'state', 'input', 'sum' or 'fuse'"),
        ("all", "Expected a TokenRoute"),
    ],
)
def test_bad_routes_are_refused(make_model, routes, message):
    with pytest.raises(ValueError, match=message):
        make_model(routes=routes)


# Inputs.


def test_no_labels_mean_the_null_class(model, inputs):
    latents, timestep, _ = inputs
    null = model(latents, timestep, torch.full((3,), 5)).sample
    assert torch.equal(model(latents, timestep).sample, null)
    assert not torch.equal(model(latents, timestep, torch.zeros(3, dtype=torch.long)).sample, null)


def test_an_unconditional_model_needs_no_labels(make_model, inputs):
    model = make_model(num_classes=0).eval()
    assert model(*inputs[:2]).sample.shape == inputs[0].shape


@pytest.mark.parametrize("timestep", [0.3, 3, torch.tensor(0.3), torch.tensor([0.3])], ids=str)
def test_one_timestep_serves_the_whole_batch(model, inputs, timestep):
    latents, _, labels = inputs
    expected = model(latents, torch.full((3,), float(timestep)), labels).sample
    assert torch.equal(model(latents, timestep, labels).sample, expected)


def test_return_dict_false_gives_a_tuple(model, inputs):
    assert torch.equal(model(*inputs, return_dict=False)[0], model(*inputs).sample)


@pytest.mark.parametrize(
    "name, shapes, message",
    [
        ("hidden_states", [(3, 4, 8, 8), (3, 8, 8), (3, 1, 8, 8)], r"Expected latents \[B, 3, H, W\], got"),
        ("hidden_states", [(3, 3, 7, 8)], "patch size 2, got 7x8"),
        ("hidden_states", [(3, 3, 8, 9)], "patch size 2, got 8x9"),
        ("class_labels", [(1,), (2,), (3, 1)], "Expected 3 class labels"),
        ("timestep", [(2,), (3, 1)], "Expected one timestep or 3"),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(model, inputs, name, shapes, message):
    inputs = dict(zip(("hidden_states", "timestep", "class_labels"), inputs, strict=True))
    for shape in shapes:
        with pytest.raises(ValueError, match=message):
            model(**inputs | {name: torch.zeros(shape, dtype=inputs[name].dtype)})


def test_a_router_that_was_replaced_is_obeyed(make_model, inputs):
    model, expected = make_model(), make_model(routes=TokenRoute(start=0, end=2))
    expected.load_state_dict(model.state_dict())
    model.token_router = expected.token_router
    call = RoutingCall(enabled=True, seed=1)
    assert torch.equal(model(*inputs, routing=call).sample, expected(*inputs, routing=call).sample)


def test_kept_ids_that_do_not_fit_are_refused(make_model, inputs):
    ids = torch.arange(4).expand(3, 4)
    mask, other_types = torch.ones(3, 16, dtype=torch.bool), [ids.float(), ids.tolist(), ids.numpy()]
    shapes = ([], [ids, ids], [ids[:2]], [ids[0]], [ids[:, :0]], [torch.arange(17).expand(3, 17)])
    for wrong in (*shapes, [mask], *([one] for one in other_types)):
        with pytest.raises(ValueError, match=r"kept_token_ids of shape \[3, K <= 16\].*1 routes"):
            make_model()(*inputs, kept_token_ids=wrong)
    with pytest.raises(ValueError, match="0 routes"):
        make_model(routes=None)(*inputs, kept_token_ids=[ids])
    with pytest.raises(ValueError, match="Expected kept_token_ids or routing, got both"):
        make_model()(*inputs, kept_token_ids=[ids], routing=RoutingCall(seed=1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 3, "attention_head_dim": 2}, "width divisible by 4"),
        ({"sample_size": 9}, "sample_size divisible by patch_size 2, got 9"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"num_classes": -1}, "num_classes >= 0"),
        ({"freq_shift": 2}, "freq_shift 0 or 1, got 2"),
        ({"num_layers": 5, "routes": "default"}, "at least 6 blocks"),
    ],
)
def test_a_bad_config_is_refused(make_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


# Gradients.


def gradients(model, *losses_inputs):
    """Gradients after the forwards of all (seed, inputs) and then one backward."""
    model.zero_grad()
    loss = 0.0
    for seed, inputs in losses_inputs:
        get_token_router(model).defaults = RoutingCall(seed=seed)
        loss = loss + model(*inputs).sample.square().mean()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(params=["default", "non-reentrant", "reentrant"])
def checkpointing(request):
    options = [functools.partial(checkpoint, use_reentrant=request.param == "reentrant")]
    return lambda model: model.enable_gradient_checkpointing(*([] if request.param == "default" else options))


def test_checkpointing_gives_the_same_gradients(make_model, inputs, checkpointing):
    model = make_model().train()
    expected = gradients(model, (3, inputs))
    checkpointing(model)
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(model, (3, inputs)), expected, atol=1e-7, rtol=1e-5)
    model.disable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model, (3, inputs)), expected, atol=0, rtol=0)


def test_checkpointing_recomputes_each_block_with_its_own_tokens(make_model, inputs, checkpointing):
    """The second forward's subset must not leak into the recomputation of the first."""
    model = make_model().train()
    other = (torch.randn(3, 3, 8, 8), *inputs[1:])
    first, second = gradients(model, (3, inputs)), gradients(model, (4, other))
    checkpointing(model)
    both = gradients(model, (3, inputs), (4, other))
    torch.testing.assert_close(both, {name: first[name] + second[name] for name in first}, atol=1e-6, rtol=1e-4)


def test_checkpointing_without_a_seed_recomputes_the_same_subset(make_model, inputs, checkpointing):
    model = make_model().train()
    torch.manual_seed(5)
    expected = gradients(model, (None, inputs))
    checkpointing(model)
    torch.manual_seed(5)
    torch.testing.assert_close(gradients(model, (None, inputs)), expected, atol=1e-7, rtol=1e-5)


def test_under_autocast_gradients_and_the_residual_stream_stay_in_fp32(make_model, inputs):
    model = make_model().train()
    expected = gradients(model, (3, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls = recorded_tokens(model, lambda: gradients(model, (3, inputs)))
        assert model(*inputs).sample.dtype == torch.float32
    assert {tensor.dtype for call in calls for tensor in call} == {torch.float32}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_same_gradients(found, expected, 0.1)


def test_the_config_and_the_inputs_are_left_as_they_were(make_model, inputs):
    model = make_model().train()
    config, before = copy.deepcopy(dict(model.config)), [tensor.clone() for tensor in inputs]
    model(*inputs).sample.sum().backward()
    assert dict(model.config) == config
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_the_docstrings_examples_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("models.transformer_tread_2d", "routing.route", "routing.router"):
            checked = importlib.import_module(f"diffusers_tread.{name}")
            result = doctest.testmod(checked)
            assert result.attempted > 0 and result.failed == 0
