# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The options of LightningDiT and ResFormer against their formulas in numpy, and what routing does to them."""

import copy
import re

import diffusers
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from diffusers_tread import RoutingCall, TREADTransformer2DModel
from diffusers_tread.flops import forward_flops
from diffusers_tread.models.transformer_tread_2d import rotary_positions, rotate


ALL = {
    "norm": "rms_norm", "qk_norm": "rms_norm", "ffn": "swiglu", "positions": "sincos+rope", "value_residual": True,
}  # fmt: skip
ROUTES = [{"start": 1, "end": 2}, {"start": 4, "end": 4}]
pytestmark = pytest.mark.filterwarnings("ignore:The route ends at block")  # a shallow model is quick


@pytest.fixture
def modern(make_model):
    return make_model(num_layers=7, routes=ROUTES, **ALL).eval()


# The forward in numpy, float64. DiT: arXiv 2212.09748. RMSNorm: 1910.07467. SwiGLU: 2002.05202. Rotary positions:
# 2104.09864, the rows' pairs first as in EVA-02. Value residual: 2410.17897.


def numpy_forward(model, latents, timestep, labels, kept_token_ids=()):
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    c, latents = model.config, latents.double().numpy()
    heads, head_dim, patch = c.num_attention_heads, c.attention_head_dim, c.patch_size
    width, (batch, channels, height, wide) = heads * head_dim, latents.shape
    rows, columns = height // patch, wide // patch
    base = c.sample_size // patch
    places = [(row * base / rows, column * base / columns) for row in range(rows) for column in range(columns)]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x, name):
        if c.norm == "rms_norm":
            return rms_norm(x, name)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def rms_norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def feed_forward(x, name):
        if c.ffn == "swiglu":
            value, gate = np.split(linear(x, f"{name}.net.0.proj"), 2, -1)
            assert value.shape[-1] == int(2 / 3 * int(c.mlp_ratio * width))
            return linear(value * silu(gate), f"{name}.net.2")
        x = linear(x, f"{name}.net.0.proj")
        return linear(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), f"{name}.net.2")

    def rotated(x, places):
        """[N, heads, head_dim] of one sample: pairs of neighbours as complex numbers."""
        quarter = head_dim // 4
        out = np.empty_like(x)
        for n, (row, column) in enumerate(places):
            angles = [place * 10000 ** (-k / quarter) for place in (row, column) for k in range(quarter)]
            turned = (x[n, :, ::2] + 1j * x[n, :, 1::2]) * np.exp(1j * np.array(angles))
            out[n, :, ::2], out[n, :, 1::2] = turned.real, turned.imag
        return out

    def attention(x, name, places, first):
        """One sample's tokens [N, D]; gives the output and the block's own values."""
        q, k, v = (part.reshape(len(x), heads, head_dim) for part in np.split(linear(x, f"{name}.to_qkv"), 3, -1))
        own = v
        if c.qk_norm:
            q, k = rms_norm(q, f"{name}.norm_q"), rms_norm(k, f"{name}.norm_k")
        if "rope" in c.positions:
            q, k = rotated(q, places), rotated(k, places)
        if first is not None:
            share = w[f"{name}.first_value_share"]
            v = share * first + (1 - share) * v
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        return linear(out.reshape(len(x), width), f"{name}.to_out.0"), own

    def block(x, name, condition, places, first):
        s1, c1, g1, s2, c2, g2 = np.split(linear(condition, f"{name}.modulation"), 6)
        attended, own = attention(norm(x, f"{name}.norm1") * (1 + c1) + s1, f"{name}.attn", places, first)
        x = x + g1 * attended
        return x + g2 * feed_forward(norm(x, f"{name}.norm2") * (1 + c2) + s2, f"{name}.ff"), own

    def sample(index):
        # Patches, positions, time and class.
        cut = latents[index].reshape(channels, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
        x = cut.reshape(rows * columns, -1) @ w["patch_embedding.weight"].reshape(width, -1).T
        x = x + w["patch_embedding.bias"]
        if "sincos" in c.positions:
            omega = 10000 ** (-np.arange(width // 4) / (width // 4))
            for n, (row, column) in enumerate(places):
                x[n] += np.concatenate([f(place * omega) for place in (column, row) for f in (np.sin, np.cos)])
        angles = timestep[index].item() * 10000 ** (-np.arange(128) / 128)
        time = linear(np.concatenate([np.cos(angles), np.sin(angles)]), "timestep_embedding.linear_1")
        time = linear(silu(time), "timestep_embedding.linear_2")
        condition = silu(time + w["class_embedding.weight"][labels[index]])

        # Blocks: inside a route those of the kept tokens alone, with their places and their first values.
        first = None
        for number in range(c.num_layers):
            kept = np.arange(len(x))
            for route, ids in zip(c.routes or [], kept_token_ids, strict=False):
                if route["start"] <= number <= route["end"]:
                    kept = ids[index].numpy()
            of_kept = None if first is None else first[kept]
            new, own = block(x[kept], f"transformer_blocks.{number}", condition, [places[n] for n in kept], of_kept)
            x = x.copy()
            x[kept] = new
            first = own if number == 0 and c.value_residual else first

        # Output.
        shift, scale = np.split(linear(condition, "modulation_out"), 2)
        out = linear(norm(x, "norm_out") * (1 + scale) + shift, "proj_out")
        out = out.reshape(rows, columns, patch, patch, -1).transpose(4, 0, 2, 1, 3)
        return out.reshape(-1, height, wide)

    return np.stack([sample(index) for index in range(batch)])


def assert_close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=2e-5 * np.abs(expected).max())


def random_ids(*sizes, num_tokens=16):
    return [torch.stack([torch.randperm(num_tokens)[:size].sort().values for _ in range(3)]) for size in sizes]


# Formulas.


@pytest.mark.parametrize(
    "options",
    [*({name: value} for name, value in ALL.items()), {"positions": "rope"}, {"ffn": "swiglu", "mlp_ratio": 2.6}, ALL],
    ids=str,
)
def test_each_option_and_all_together_equal_the_formulas(make_model, inputs, options):
    model, ids = make_model(**options), random_ids(7)
    dense = numpy_forward(model, *inputs)
    assert_close(model.eval()(*inputs).sample, dense)
    routed = numpy_forward(model, *inputs, ids)
    assert_close(model(*inputs, kept_token_ids=ids).sample, routed)
    assert np.abs(routed - dense).max() > 1e-3


@pytest.mark.parametrize("size", [(4, 12), (10, 6)])
def test_other_sizes_are_scaled_to_the_range_of_the_training_grid(modern, size):
    inputs = torch.randn(3, 3, *size), torch.randn(3), torch.tensor([0, 5, 2])
    ids = random_ids(5, 9, num_tokens=size[0] * size[1] // 4)
    assert_close(modern(*inputs).sample, numpy_forward(modern, *inputs))
    assert_close(modern(*inputs, kept_token_ids=ids).sample, numpy_forward(modern, *inputs, ids))


def test_only_the_difference_of_places_counts_for_rotated_queries_and_keys(make_model):
    """Known solution: q . k of equal vectors is the sum of the pairs' lengths times the cosines of the distances."""
    table, x = rotary_positions(8, 4, 4, base=4), torch.ones(1, 16, 1, 8)
    scores = torch.einsum("qd,kd->qk", *(rotate(x, table)[0, :, 0].double(),) * 2)
    for q in range(16):
        for k in range(16):
            down, across = q // 4 - k // 4, q % 4 - k % 4
            expected = 2 * sum(np.cos(distance * theta) for distance in (down, across) for theta in (1, 0.01))
            assert scores[q, k].item() == pytest.approx(expected, abs=1e-5)


# What routing does to them.


def test_blocks_do_not_see_the_order_of_tokens_that_take_their_rows_and_first_values_along(modern):
    """Inside a route the stack gathers, per sample; were one thing gathered otherwise, this would not be so."""
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    block, tokens, conditioning = modern.transformer_blocks[1], torch.randn(3, 16, 16), torch.randn(3, 16)
    rotary, first = rotary_positions(8, 4, 4, base=4).expand(3, -1, -1), torch.randn(3, 16, 16)

    def taken(x):
        return torch.stack([x[index, order[index]] for index in range(3)])

    expected = taken(block(tokens, conditioning, rotary, first)[0])
    found = block(taken(tokens), conditioning, taken(rotary), taken(first))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for wrong in ((rotary, taken(first)), (taken(rotary), first)):
        assert not torch.allclose(block(taken(tokens), conditioning, *wrong)[0], expected, atol=1e-3)


def test_a_block_in_a_route_gets_the_rows_and_first_values_of_its_own_samples_kept_tokens(modern, inputs):
    seen, ids = {}, random_ids(5, 11)
    for index, block in enumerate(modern.transformer_blocks):
        block.register_forward_hook(lambda module, args, output, index=index: seen.update({index: (args, output)}))
    modern(*inputs, kept_token_ids=ids)
    table, first = rotary_positions(8, 4, 4, base=4)[0], seen[0][1][1]
    for index, kept in ((1, ids[0]), (2, ids[0]), (4, ids[1])):
        for sample in range(3):
            assert torch.equal(seen[index][0][2][sample], table[kept[sample]])
            assert torch.equal(seen[index][0][3][sample], first[sample, kept[sample]])
    for index in (3, 5):
        assert torch.equal(seen[index][0][3], first) and torch.equal(seen[index][0][2][0], table)

    # Routed tokens come back with their bits.
    routed = torch.ones(3, 16, dtype=torch.bool).scatter(1, ids[0], False)
    assert torch.equal(seen[3][0][0][routed], seen[0][1][0][routed])
    assert not torch.equal(seen[3][0][0][~routed], seen[0][1][0][~routed])


def test_a_ratio_of_zero_is_dense_and_a_prefix_gives_the_bits_of_a_whole_forward(modern, inputs):
    dense = modern(*inputs, return_prefix=True)
    zero = modern(*inputs, routing=RoutingCall(enabled=True, selection_ratio=0.0))
    assert torch.equal(zero.sample, dense.sample) and dense.prefix.shape == (3, 16, 32)
    routing = RoutingCall(enabled=True, selection_ratio=0.5, seed=3)
    whole, given = modern(*inputs, routing=routing), modern(*inputs, routing=routing, prefix=dense.prefix)
    assert torch.equal(given.sample, whole.sample) and not torch.equal(whole.sample, dense.sample)
    with pytest.raises(ValueError, match=r"Expected a prefix \[3, 16, 32\]"):
        modern(*inputs, prefix=dense.prefix[..., :16])


def test_a_sample_does_not_depend_on_its_batch(modern, inputs):
    routing = RoutingCall(enabled=True, seed=torch.tensor([3, 4, 5]))
    together = modern(*inputs, routing=routing).sample
    for index in range(3):
        one = [tensor[index : index + 1] for tensor in inputs]
        alone = modern(*one, routing=RoutingCall(enabled=True, seed=torch.tensor([3 + index]))).sample
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-4)


def test_a_route_from_the_first_block_is_refused_with_a_value_residual(make_model):
    with pytest.raises(ValueError, match="Expected routes that begin after block 0.* Use start=1"):
        make_model(value_residual=True, routes=[{"start": 0, "end": 2}])


# Training.


def test_the_output_is_zero_at_initialisation_and_shares_of_first_values_start_at_a_half(inputs):
    model = TREADTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=6, in_channels=3, num_classes=5, **ALL
    )
    assert torch.count_nonzero(model.train()(*inputs).sample) == 0
    shares = {name: p.tolist() for name, p in model.named_parameters() if "first_value_share" in name}
    assert shares == {f"transformer_blocks.{i}.attn.first_value_share": [0.5] for i in range(1, 6)}
    norms = [p for name, p in model.named_parameters() if re.search(r"norm\w*\.weight", name)]
    assert len(norms) == 6 * 4 + 1 and all(p.eq(1).all() for p in norms)


def test_every_parameter_gets_the_same_gradient_with_checkpoints(modern, inputs):
    model, gradients = modern.train(), []
    for _ in range(2):
        model.zero_grad()
        model(*inputs, routing=RoutingCall(seed=3)).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    assert all(gradient.count_nonzero() > 0 for gradient in gradients[0].values())


def test_autocast_and_bf16_weights_are_near_fp32_and_rotate_in_fp32(modern, inputs):
    expected = modern(*inputs).sample
    with torch.autocast("cpu", torch.bfloat16):
        cast = modern(*inputs, return_prefix=True)
        again = modern(*inputs, prefix=cast.prefix).sample
    half = copy.deepcopy(modern).to(torch.bfloat16)
    seen = []
    half.transformer_blocks[2].register_forward_pre_hook(lambda block, args: seen.append(args[2].dtype))
    found = half(inputs[0].bfloat16(), *inputs[1:]).sample
    assert found.dtype == torch.bfloat16 and seen == [torch.float32] and torch.equal(again, cast.sample)
    for sample in (cast.sample, found.float()):
        assert 0 < (sample - expected).norm() < 0.1 * expected.norm()


@pytest.mark.slow
def test_two_sizes_compile_to_one_graph(make_model):
    torch._dynamo.reset()
    counters.clear()
    model = make_model(num_layers=4, routes=[{"start": 1, "end": 1}], **ALL).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((8, 12), (8, 8)):
        call = {"timestep": torch.rand(2), "class_labels": torch.tensor([0, 1])}
        call["routing"] = RoutingCall(enabled=True, seed=3)
        latents = torch.randn(2, 3, *size)
        with torch.no_grad():
            found, expected = compiled(latents, **call).sample, model(latents, **call).sample
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


# The config.


@pytest.mark.parametrize(
    "option", [{"norm": "rms"}, {"qk_norm": "layer_norm"}, {"ffn": "geglu"}, {"positions": "rotary"}], ids=str
)
def test_an_unknown_option_is_named_with_what_there_is(make_model, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"Expected {name} among .*, got '{value}'"):
        make_model(**option)


def test_heads_that_cannot_be_rotated_are_refused(make_model):
    with pytest.raises(ValueError, match="attention_head_dim divisible by 4 for rope, got 6"):
        make_model(positions="rope", attention_head_dim=6)


@pytest.mark.parametrize(
    "preset, dim, depth, heads, hidden",
    [("S", 384, 12, 6, 1024), ("B", 768, 12, 12, 2048), ("L", 1024, 24, 16, 2730), ("XL", 1152, 28, 16, 3072)],
)
def test_presets_have_lightningdits_sizes(preset, dim, depth, heads, hidden):
    with torch.device("meta"):
        model = TREADTransformer2DModel.from_preset(f"LightningDiT-{preset}/1")
    config = model.config
    assert (config.num_attention_heads, config.num_layers, config.patch_size) == (heads, depth, 1)
    assert (config.sample_size, config.in_channels, config.qk_norm, config.value_residual) == (16, 32, None, False)
    ends = 2 * 32 * dim + dim + 32 + dim + 2 * dim * dim + 2 * dim + 257 * dim + dim * dim + dim + 1001 * dim
    attention = 4 * (dim * dim + dim)
    block = attention + 3 * dim * hidden + 2 * hidden + dim + 2 * dim + 6 * (dim * dim + dim)
    assert sum(p.numel() for p in model.parameters()) == depth * block + ends


def test_a_lightningdit_has_the_flops_of_the_dit_of_its_size():
    """Three matrices of two thirds of the width: norms, rotations and products of elements do not count."""
    plain = {"norm": "layer_norm", "ffn": "gelu-approximate", "positions": "sincos"}
    with torch.device("meta"):
        models = [TREADTransformer2DModel.from_preset("LightningDiT-S/1", **changes) for changes in ({}, plain)]
    assert forward_flops(models[0]) == forward_flops(models[1])


# What diffusers offers.


CACHES = {"first block": lambda: diffusers.FirstBlockCacheConfig(threshold=2.0)}
if hasattr(diffusers, "MagCacheConfig"):
    CACHES["MagCache"] = lambda: diffusers.MagCacheConfig(
        threshold=0.2, max_skip_steps=2, num_inference_steps=8, mag_ratios=torch.ones(8)
    )


@pytest.mark.parametrize("cache", CACHES)
def test_caches_that_go_by_what_a_block_gives_skip_blocks_that_hand_first_values_on(modern, inputs, cache):
    runs = []
    for block in modern.transformer_blocks:
        block.attn.to_out[0].register_forward_hook(lambda *_: runs.append(1))
    modern.enable_cache(CACHES[cache]())
    with torch.no_grad(), modern.cache_context("pred_cond"):
        first = modern(*inputs).sample
        for _ in range(3):
            last = modern(*inputs).sample
    assert 0 < len(runs) < 4 * 7
    assert last.isfinite().all() and (last - first).norm() < 0.5 * first.norm()
    modern.disable_cache()
    torch.testing.assert_close(modern(*inputs).sample, first)


def test_an_adapter_on_query_key_and_value_reaches_the_first_values(modern, inputs):
    peft = pytest.importorskip("peft")
    seen = []
    modern.transformer_blocks[3].register_forward_pre_hook(lambda block, args: seen.append(args[3]))
    modern(*inputs)
    modern.add_adapter(peft.LoraConfig(target_modules=r"transformer_blocks\.0\.attn\.to_qkv", init_lora_weights=False))
    modern(*inputs)
    assert not torch.allclose(*seen, atol=1e-3)
