# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Routes that end in a fusion, and paths that are dropped (SPRINT, arXiv 2510.21986)."""

import pytest
import torch
from backbones import BACKBONES, make_backbone, route_of
from closeness import assert_same_gradients
from diffusers import FirstBlockCacheConfig
from test_transformer_tread_2d import assert_close, numpy_forward, random_ids

from diffusers_tread import RoutingCall, TREADTransformer2DModel, token_routing
from diffusers_tread.routing import make_fusions


FUSE = {"start": 1, "end": 3, "selection_ratio": 0.75, "rejoin": "fuse"}
DROP = RoutingCall(path_drop=True)


@pytest.fixture
def fused(make_model):
    """A model with one fused route, of whose path half of the samples go without in training."""
    return make_model(routes=[FUSE | {"path_drop": 0.5}])


@pytest.fixture
def inputs():
    return torch.randn(3, 3, 8, 8), torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 5, 2])


def backbone(name, **changes):
    route = route_of(name) | {"rejoin": "fuse", "selection_ratio": 0.75, "path_drop": 0.5}
    return make_backbone(name, routes=[route], **changes)


# The forward.


def test_the_fused_forward_equals_the_formulas(make_model, inputs):
    model = make_model(num_layers=9, routes=[FUSE, {"start": 4, "end": 4}, {"start": 5, "end": 6, "rejoin": "fuse"}])
    assert list(model.route_fusions) == ["0", "2"]
    inputs, ids, every = (inputs[0], torch.randn(3), inputs[2]), random_ids(4, 11, 7), random_ids(16)[0]
    routed = numpy_forward(model, *inputs, ids)
    assert_close(model(*inputs, kept_token_ids=ids).sample, routed)
    assert_close(model.eval()(*inputs).sample, numpy_forward(model, *inputs, [every] * 3))
    assert_close(model(*inputs, kept_token_ids=[None, ids[1], None]).sample,
                 numpy_forward(model, *inputs, [every, ids[1], every]))  # fmt: skip

    dropped = numpy_forward(model, *inputs, [None, every, None])
    assert_close(model(*inputs, routing=DROP).sample, dropped)
    assert abs(dropped - routed).max() > 0.01 * abs(routed).max()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_weight_gets_a_gradient_in_routed_dense_and_dropped_steps(name, inputs):
    """Which DDP waits for; the same ones with checkpoints."""
    model = backbone(name).train()

    def gradients(**call):
        model.zero_grad()
        model(*inputs, routing=RoutingCall(**call)).sample.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    assert not gradients(enabled=False)["route_fusions.0.mask"].any()
    assert gradients(selection_ratio=0.0, seed=3)["route_fusions.0.mask"].any()
    expected = gradients(seed=3)
    model.enable_gradient_checkpointing()
    assert_same_gradients(gradients(seed=3), expected, 1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_at_initialisation_the_dense_model_is_what_it_is_without_a_fusion(name, inputs):
    model = backbone(name, fresh=True).eval()
    output = model(*inputs, hidden_states_at=(5,), return_prefix=True)
    before = output.prefix[..., :16]  # beside it, what the first block made
    torch.testing.assert_close(output.hidden_states[5], before)

    weak = model(*inputs, hidden_states_at=(5,), routing=RoutingCall(selection_ratio=0.75)).hidden_states[5]
    assert torch.cosine_similarity(weak, before, dim=2).min() > 0.99


# Path drop.


def test_the_samples_whose_path_is_dropped_follow_from_the_seed(fused):
    """Half of them, whatever the rest of the batch, and not the same as with another seed."""
    many = [tensor.repeat(64, *[1] * (tensor.dim() - 1)) for tensor in (torch.randn(1, 3, 8, 8), torch.zeros(1))]
    seeds = torch.arange(64)

    def dropped(order, call=None):
        with torch.no_grad():
            routing = RoutingCall(seed=seeds[order]) if call is None else call
            sample = fused(many[0], many[1], routing=routing).sample
            without = fused(many[0], many[1], routing=DROP).sample
        return [torch.allclose(one, other, atol=1e-5) for one, other in zip(sample, without, strict=True)]

    fused.train()
    first = dropped(seeds)
    assert 20 <= sum(first) <= 44 and dropped(seeds) == first
    assert dropped(seeds.flip(0)) == first[::-1]
    assert dropped(seeds, RoutingCall(seed=seeds, selection_ratio=0.0)) == first  # the dense end of a training
    assert dropped(seeds, RoutingCall(seed=1)) != dropped(seeds, RoutingCall(seed=2))

    # Nowhere else.
    for call in (RoutingCall(enabled=False), RoutingCall(seed=seeds, path_drop=False)):
        assert not any(dropped(seeds, call))
    fused.eval()
    assert not any(dropped(seeds, RoutingCall(seed=seeds, enabled=True)))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_dropped_path_runs_no_block_of_the_route(name, inputs):
    model, ran = backbone(name).eval(), []
    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda block, args, output, index=index: ran.append(index))
    strong = model(*inputs, return_prefix=True)
    ran.clear()
    weak = model(*inputs, routing=DROP, prefix=strong.prefix).sample
    assert ran == [4, 5]
    with token_routing(model, path_drop=True):
        assert torch.equal(weak, model(*inputs).sample) and not torch.equal(weak, strong.sample)
    assert ran == [4, 5, 0, 4, 5]
    routed = model(*inputs, routing=RoutingCall(selection_ratio=0.75), hidden_states_at=(3, 4)).hidden_states
    assert routed[3].shape == (3, 4, 16) and routed[4].shape == (3, 16, 16)  # four kept tokens, all again
    with pytest.raises(ValueError, match=r"0 to 5 but for a path that is dropped, got \[3\]"):
        model(*inputs, routing=DROP, hidden_states_at=(3, 4))


# What there is around it.


def test_a_saved_model_has_its_fusion_and_one_without_has_none(fused, inputs, tmp_path):
    fused.eval().save_pretrained(tmp_path)
    loaded = TREADTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.routes == [FUSE | {"path_drop": 0.5}]
    assert torch.equal(loaded(*inputs).sample, fused(*inputs).sample)
    plain = TREADTransformer2DModel(num_layers=6, sample_size=8)
    assert set(fused.state_dict()) - set(plain.state_dict()) == {
        "route_fusions.0.mask", "route_fusions.0.proj.weight", "route_fusions.0.proj.bias"
    }  # fmt: skip


def test_a_dense_checkpoint_gets_a_new_fusion(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    options = {"routes": [FUSE], "low_cpu_mem_usage": False}
    fusion = TREADTransformer2DModel.from_pretrained(tmp_path, **options).route_fusions["0"]
    assert fusion.proj.weight.sum() == len(fusion.mask) and not fusion.proj.bias.any()
    assert 0.005 < fusion.mask.std() < 0.05


def test_what_a_fusion_does_not_go_with_is_refused(fused, make_model, inputs):
    with pytest.raises(ValueError, match="Expected a route with rejoin='fuse', whose path can be dropped"):
        make_model()(*inputs, routing=DROP)
    with pytest.raises(ValueError, match="Expected path_drop to be True, False or None, got 0.1"):
        RoutingCall(path_drop=0.1)
    with pytest.raises(ValueError, match=r"Expected fusions with a RouteFusion for route 0, got \[\]"):
        fused.transformer_blocks(torch.randn(3, 16, 16), None, routes=fused.token_router.routes)
    assert not make_fusions(make_model().token_router.routes, 16)
    fused.eval().enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="without a cache where a route has rejoin='fuse'"):
        fused(*inputs)
