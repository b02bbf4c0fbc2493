# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The Mamba-2 model against its formulas, token by token. What holds for every backbone: test_every_backbone.py."""

import pytest
import torch
import torch.nn.functional as F
from backbones import make_backbone
from closeness import difference

from diffusers_tread import RoutingCall, TREADMamba2DModel


pytestmark = pytest.mark.filterwarnings("ignore:The route ends at block")


def normalised(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def mixer_formula(mixer, tokens):
    """The mixer in float64, one token after the other, for tokens in the order of the scan."""
    w = {name: tensor.double() for name, tensor in mixer.state_dict().items()}
    inner, states, heads = w["D"].numel() * mixer.head_dim, mixer.state_size, w["D"].numel()
    gate, mixed, raw_steps = (tokens @ w["in_proj.weight"].T).split([inner, inner + 4 * states, 2 * heads], -1)

    # Depthwise convolution about each token.
    kernel = w["conv.weight"][:, 0, 0]
    reach = kernel.shape[1] // 2
    padded, length = F.pad(mixed, (0, 0, reach, reach)), tokens.shape[1]
    mixed = sum(kernel[:, k] * padded[:, k : k + length] for k in range(kernel.shape[1])) + w["conv.bias"]
    x, b, c = F.silu(mixed).split([inner, 2 * states, 2 * states], -1)
    x = x.unflatten(-1, (heads, -1))

    # Each direction's state: before a token is written, it is decayed and read.
    y = w["D"].unsqueeze(-1) * x
    for direction, order in ((0, range(length)), (1, range(length - 1, -1, -1))):
        state = torch.zeros(*x[:, 0].shape, states, dtype=torch.float64)
        of_states, of_heads = (slice(direction * size, (direction + 1) * size) for size in (states, heads))
        steps = F.softplus(raw_steps[..., of_heads] + w["dt_bias"])  # B L H
        for t in order:
            state = torch.exp(-w["A_log"].exp() * steps[:, t])[..., None, None] * state
            y[:, t] += torch.einsum("bhps,bs->bhp", state, c[:, t, of_states])
            state = state + torch.einsum("bh,bhp,bs->bhps", steps[:, t], x[:, t], b[:, t, of_states])
    return normalised(y.flatten(2)) * w["norm.weight"] * F.silu(gate) @ w["out_proj.weight"].T


def block_formula(block, tokens, conditioning, order):
    """The block in float64; `order` lists, per sample, the tokens as they are scanned."""
    modulation = conditioning @ block.modulation.weight.double().T + block.modulation.bias.double()
    shift, scale, gate = modulation.unsqueeze(1).chunk(3, -1)
    mixer_input = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
    output = tokens.clone()
    for sample, ids in enumerate(order):
        output[sample, ids] += gate[sample] * mixer_formula(block.mixer, mixer_input[sample : sample + 1, ids])[0]
    return output


@pytest.fixture
def model():
    return make_backbone("mamba").eval()


def block_inputs(model):
    """Tokens of a grid of 3 x 4, their column ranks, and conditioning."""
    tokens, conditioning = torch.randn(2, 12, 16), torch.randn(2, 16)
    (ranks,), _ = model._block_arguments(tokens, conditioning, height=3, width=4)
    return tokens, ranks, conditioning


def test_blocks_scan_rows_and_columns_in_turn(model):
    tokens, ranks, conditioning = block_inputs(model)
    by_columns = [row * 4 + column for column in range(4) for row in range(3)]
    for index, order in enumerate([list(range(12)), by_columns, list(range(12)), by_columns]):
        block = model.transformer_blocks[index]
        expected = block_formula(block, tokens.double(), conditioning.double(), [order, order])
        assert difference(block(tokens, conditioning, ranks), expected) < 1e-5


@pytest.mark.parametrize("kept", [[[0, 1, 2, 3, 8, 9, 10, 11]] * 2, [[0, 1, 5, 6, 7, 10], [1, 2, 3, 4, 8, 11]]])
def test_kept_tokens_are_scanned_in_the_order_of_their_columns(model, kept):
    """Rows, which are the same columns shortened, and single tokens, of each sample its own."""
    tokens, ranks, conditioning = block_inputs(model)
    ids = torch.tensor(kept)
    tokens = torch.stack([tokens[sample, ids[sample]] for sample in range(2)])
    order = [sorted(range(len(one)), key=lambda i, one=one: (one[i] % 4, one[i] // 4)) for one in kept]
    expected = block_formula(model.transformer_blocks[1], tokens.double(), conditioning.double(), order)
    found = model.transformer_blocks[1](tokens, conditioning, ranks.expand(2, -1).gather(1, ids))
    assert difference(found, expected) < 1e-5


def test_the_default_route_keeps_whole_rows():
    latents, timestep, routing = torch.randn(2, 3, 8, 8), torch.zeros(2), RoutingCall(enabled=True, seed=1)
    (ids,) = make_backbone("mamba", routes="default")(latents, timestep, routing=routing).kept_token_ids
    rows = ids.unflatten(1, (2, 4))
    assert torch.equal(rows, rows[..., :1] // 4 * 4 + torch.arange(4))


def test_decays_and_time_steps_start_in_their_ranges_and_stay_float32(tmp_path):
    model = make_backbone("mamba", fresh=True)
    for block in model.transformer_blocks:
        assert ((block.mixer.A_log.exp() >= 1) & (block.mixer.A_log.exp() <= 16)).all()
        time_step = F.softplus(block.mixer.dt_bias)
        assert ((time_step > 0.99e-3) & (time_step < 0.101)).all()
    model.save_pretrained(tmp_path)
    loaded = TREADMamba2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = {name.rpartition(".")[2] for name, one in loaded.named_parameters() if one.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "preset, dim, depth, millions", [("S", 384, 24, 36), ("B", 768, 24, 136), ("L", 1024, 48, 474)]
)
def test_presets_have_about_the_size_of_dits(preset, dim, depth, millions):
    with torch.device("meta"):
        model = TREADMamba2DModel.from_preset(f"Mamba-{preset}/2")
    config, count = model.config, sum(parameter.numel() for parameter in model.parameters())
    assert (config.hidden_size, config.num_layers, round(count / 1e6)) == (dim, depth, millions)
    assert config.routes == [{"start": 2, "end": depth - 4, "selection_ratio": 0.5, "unit": "row"}]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 7}, "Expected head_dim to divide"),
        ({"conv_kernel": 4}, "odd conv_kernel"),
        *(({name: 0}, f"Expected {name} to be an int >= 1, got 0") for name in ("head_dim", "expand", "state_size")),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_backbone("mamba", **changes)
