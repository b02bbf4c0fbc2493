# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What routing promises, for every transformer class of diffusers that it supports."""

import copy
import dataclasses
import inspect
import io
from functools import cache

import pytest
import tiny_transformers
import torch
from diffusers.training_utils import EMAModel
from gradients import assert_same, gradients_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffusers_tread import RoutingCall, TokenRoute, get_token_router, token_routing
from diffusers_tread.flops import forward_flops
from diffusers_tread.hooks import apply_token_routing, check_token_routing, remove_token_routing
from diffusers_tread.hooks.specs import BLOCK_SPECS, MODEL_SPECS, find_by_class
from diffusers_tread.hooks.wrap_block import map_leaves


ROUTE = TokenRoute(start=1, end=-4, selection_ratio=0.5)
SEED = 5

built = cache(tiny_transformers.build)
every_model = pytest.mark.parametrize("name", tiny_transformers.names())
every_class = pytest.mark.parametrize("name", tiny_transformers.classes())


@pytest.fixture
def case(name):
    """The model and its inputs, built once for all tests, which leave it as they found it."""
    case = built(name)
    yield case
    if hasattr(case.model, "_token_routing"):
        remove_token_routing(case.model)
    if case.model._supports_gradient_checkpointing:
        case.model.disable_gradient_checkpointing()
    case.model.eval().zero_grad()


def copied(case):
    """For tests that change weights or modules."""
    return dataclasses.replace(case, model=copy.deepcopy(case.model))


def route(case):
    apply_token_routing(case.model, dataclasses.replace(ROUTE, unit=case.unit)).defaults = RoutingCall(
        shared_subset=case.shared
    )
    return case


def run(model, inputs):
    """The prediction as one tensor."""
    output = model(**inputs, return_dict=False)
    output = output[0] if isinstance(output, tuple) else output  # Kandinsky 5 returns a tensor
    return torch.stack(output) if isinstance(output, list) else output


def routed_run(model, inputs, seed=SEED):
    with token_routing(model, enabled=True, seed=seed):
        return run(model, inputs)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return gradients_of(model)


@every_model
@torch.no_grad()
def test_off_and_ratio_zero_equal_the_untouched_model_bitwise(case):
    expected_in_evaluation = run(case.model, case.inputs)
    expected = run(case.model.train(), case.inputs)
    route(case)

    assert torch.equal(run(case.model.eval(), case.inputs), expected_in_evaluation)
    case.model.train()
    with token_routing(case.model, enabled=False):
        assert torch.equal(run(case.model, case.inputs), expected)
    with token_routing(case.model, selection_ratio=0.0):
        assert torch.equal(run(case.model, case.inputs), expected)
    assert not torch.equal(run(case.model, case.inputs), expected)  # the default in training mode


@every_model
def test_permuted_tokens_give_the_dense_output(case):
    route(case)
    # SANA-WM inverts matrices in its attention.
    tolerance = 1e-4 if type(case.model).__name__ == "SanaWMTransformer3DModel" else 1e-5
    assert check_token_routing(case.model, **case.inputs) < tolerance


@every_model
def test_a_spec_without_one_of_its_tokens_entries_is_noticed(case, monkeypatch):
    """So the test above cannot pass by luck: whatever is gathered for this model matters to its output."""
    for cls in {type(block).__name__ for block in case.model.modules()} & set(BLOCK_SPECS):
        spec = BLOCK_SPECS[cls]
        for key in set(spec.tokens) - used_nowhere(case, cls):
            with monkeypatch.context() as patch:
                tokens = {k: axis for k, axis in spec.tokens.items() if k != key}
                patch.setitem(BLOCK_SPECS, cls, dataclasses.replace(spec, tokens=tokens))
                route(case)
                with pytest.raises((ValueError, RuntimeError, IndexError)):
                    check_token_routing(case.model, tolerance=1e-4, **case.inputs)
                    # A mask of ones survives a permutation, but has the wrong length.
                    routed_run(case.model, case.inputs)
                remove_token_routing(case.model)


@torch.no_grad()
def used_nowhere(case, cls):
    """The entries of a block's spec that this model does not give, or gives for all tokens at once."""
    spec, used = BLOCK_SPECS[cls], set()

    def look(module, args, kwargs):
        arguments = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        length = arguments[spec.hidden].shape[0 if spec.sequence_first else 1]
        for key, (name, path, axis) in zip(spec.tokens, spec.gathers, strict=True):
            map_leaves(arguments.get(name), path, lambda leaf: note(leaf, key, axis, length))  # noqa: B023

    def note(leaf, key, axis, length):
        if isinstance(leaf, torch.Tensor):
            axes = axis.get(leaf.ndim, ()) if isinstance(axis, dict) else axis
            if any(leaf.shape[a] >= length for a in ((axes,) if isinstance(axes, int) else axes)):
                used.add(key)

    handles = [
        block.register_forward_pre_hook(look, with_kwargs=True)
        for block in case.model.modules()
        if type(block).__name__ == cls
    ]
    run(case.model, case.inputs)
    for handle in handles:
        handle.remove()
    return set(spec.tokens) - used


@every_model
@torch.no_grad()
def test_a_batch_equals_each_sample_alone(case):
    route(case)
    seeds = torch.tensor([11, 12])
    if case.shared:
        seeds = torch.tensor([11, 11])
    together = routed_run(case.model, case.inputs, seeds)
    for index in range(2):
        alone = routed_run(case.model, case.sample(index), seeds[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())


@every_model
@torch.no_grad()
def test_half_of_the_image_tokens_and_no_other_bypass_the_blocks_bitwise(case):
    route(case)
    seen = []
    handles = [b.register_forward_hook(record(b, seen), with_kwargs=True) for b in get_blocks(case.model)]
    routed_run(case.model, case.inputs)
    for handle in handles:
        handle.remove()

    assert len(seen) == len(get_blocks(case.model))
    chosen = []
    for before, after in seen:
        bypassed = (before == after).all(dim=2)  # B L
        starts = case.starts.get(bypassed.shape[1], 0)
        starts = starts if isinstance(starts, list) else [starts] * 2
        rows = [row[start : start + case.num_tokens] for row, start in zip(bypassed, starts, strict=True)]
        assert all(row.sum() == case.num_tokens // 2 for row in rows)
        assert bypassed.sum() == case.num_tokens // 2 * 2  # none outside the window
        chosen.append(torch.stack(rows))
    assert all(torch.equal(chosen[0], other) for other in chosen[1:])  # one subset for the whole route
    assert torch.equal(chosen[0][0], chosen[0][1]) == case.shared


def get_blocks(model):
    return [forward.module for forward in model._token_routing.blocks if forward.route_index is not None]


def record(block, seen):
    spec = block.forward.spec

    def hook(module, args, kwargs, output):
        before = block.forward._argument(args, kwargs, spec.hidden)
        after = output[spec.output] if isinstance(output, tuple) else output
        if spec.sequence_first:
            before, after = before.transpose(0, 1), after.transpose(0, 1)
        seen.append((before, after))

    return hook


@every_class
@torch.no_grad()
def test_a_row_of_the_latents_is_a_row_of_the_grid_that_the_model_tells(case):
    spec, latents = find_by_class(MODEL_SPECS, case.model), case.inputs.get("hidden_states")
    if spec is None or spec.grid is None:
        pytest.skip("nothing tells the grid of this model's tokens")
    frames, height, width = (1, *spec.grid(case.model, case.inputs))[-3:]
    assert frames * height * width == case.num_tokens
    if latents.ndim == 3:  # tokens already, in raster order
        return

    apply_token_routing(case.model, TokenRoute(start=0, end=-4, unit="row"))
    block, seen = get_blocks(case.model)[0], []
    handle = block.register_forward_hook(record(block, seen), with_kwargs=True)
    rows = latents.shape[-2] // height
    changed = latents.clone()
    changed[..., rows : 2 * rows, :] += 1.0
    for hidden_states in (latents, changed):
        run(case.model, case.inputs | {"hidden_states": hidden_states})
    handle.remove()
    (before, _), (after, _) = seen
    start = case.starts.get(before.shape[1], 0)
    differs = (before != after).any(dim=2)[:, start : start + case.num_tokens].unflatten(1, (frames, height, width))
    assert differs[:, :, 1].all() and differs.sum() == 2 * frames * width


@every_class
@torch.no_grad()
def test_removal_restores_the_model_bitwise(case):
    attributes = set(vars(case.model))
    expected = run(case.model.train(), case.inputs)
    route(case)
    routed_run(case.model, case.inputs)
    remove_token_routing(case.model)
    assert torch.equal(run(case.model, case.inputs), expected)
    assert not any("forward" in module.__dict__ for module in case.model.modules())
    assert set(vars(case.model)) == attributes


@every_class
@torch.no_grad()
def test_a_deepcopy_and_a_pickle_route_alike_with_their_own_weights(case):
    case = route(copied(case))
    expected = routed_run(case.model, case.inputs)
    buffer = io.BytesIO()
    torch.save(case.model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(case.model), torch.load(buffer, weights_only=False)]
    for parameter in case.model.parameters():
        parameter.zero_()
    for twin in copies:
        assert get_token_router(twin) is not get_token_router(case.model)
        assert torch.equal(routed_run(twin, case.inputs), expected)


@every_class
def test_saved_files_are_those_of_the_untouched_model(case, tmp_path):
    case.model.save_pretrained(tmp_path / "plain")
    route(case).model.save_pretrained(tmp_path / "routed")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "routed").iterdir()) and "config.json" in files
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "routed" / file).read_bytes()


@every_class
@torch.no_grad()
def test_an_ema_of_a_routed_model_follows_its_weights(case):
    case = route(copied(case))
    ema = EMAModel(case.model.parameters(), decay=0.0, model_cls=type(case.model), model_config=case.model.config)
    for parameter in case.model.parameters():
        parameter.mul_(1.1)
    expected = routed_run(case.model, case.inputs)
    ema.step(case.model.parameters())
    for parameter in case.model.parameters():
        parameter.zero_()
    ema.copy_to(case.model.parameters())
    assert torch.equal(routed_run(case.model, case.inputs), expected)


@every_class
@torch.no_grad()
def test_lora_added_before_and_after_routing_is_the_same(case):
    peft = pytest.importorskip("peft")
    if not hasattr(case.model, "add_adapter"):
        pytest.skip("this class takes no adapters")
    targets = r".*(blocks|layers)\.[0-3]\..*to_(q|query)"
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    outputs = []
    for lora_first in (True, False):
        twin = copied(case)
        for step in ("lora", "route") if lora_first else ("route", "lora"):
            torch.manual_seed(0)
            if step == "lora":
                twin.model.add_adapter(config)
            else:
                route(twin)
        outputs.append(routed_run(twin.model, twin.inputs))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], routed_run(route(case).model, case.inputs))


@every_model
def test_checkpointed_gradients_equal_plain_ones_with_two_forwards_before_the_backward(case):
    if not case.model._supports_gradient_checkpointing:
        pytest.skip("this class has no gradient checkpointing of its blocks")
    inputs = dict(case.inputs)
    if type(case.model).__name__ == "ChromaTransformer2DModel":
        del inputs["attention_mask"]  # its single blocks lose it under checkpointing, routed or not
    route(case).model.train()

    def loss():
        return sum(routed_run(case.model, inputs, seed).square().mean() for seed in (1, 2))

    expected = gradients(case.model, loss())
    case.model.enable_gradient_checkpointing(checkpoint_with_kwargs)
    assert_same(gradients(case.model, loss()), expected)


def checkpoint_with_kwargs(function, *args, **kwargs):
    """As diffusers' default, which takes no keywords, so that HunyuanImage fails with it, routed or not."""
    return checkpoint(function.__call__, *args, use_reentrant=False, **kwargs)


LOOKS_AT_VALUES = """BriaFibo2 ErnieImage GlmImage HiDreamImage HunyuanVideo15 HunyuanVideoFramepack Ideogram4 Lumina2
    MiniMaxH3 Mochi NucleusMoEImage OmniGen QwenImage21 SanaWM""".split()


@every_model
@torch.no_grad()
def test_flops_without_data_are_those_of_a_forward_or_refused(name):
    case = route(copied(built(name)))
    if name.split("Transformer")[0] in LOOKS_AT_VALUES:
        with pytest.raises(ValueError, match="whose forward does not look at values"):
            forward_flops(case.model, case.inputs)
        return
    flops = forward_flops(case.model, case.inputs).total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with token_routing(case.model, enabled=True):
            case.model(**case.inputs)
    assert flops == counter.get_total_flops() > 0
