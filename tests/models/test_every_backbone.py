# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What holds for the denoisers of every architecture: routing, and what diffusers users do with models."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from backbones import BACKBONES, SHARED, make_backbone, route_of
from closeness import assert_same_gradients
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

from diffusers_tread import (
    FlowSDEScheduler,
    RoutingCall,
    SparseGuidance,
    TokenRoute,
    TREADPipeline,
    apply_token_routing,
)
from diffusers_tread.flops import flop_ceiling, guidance_flops, training_flops
from diffusers_tread.hub import export_for_hub
from diffusers_tread.models import make_denoiser


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_tread  # noqa: E402


pytestmark = [
    pytest.mark.parametrize("name", BACKBONES),
    pytest.mark.filterwarnings("ignore:The route ends at block"),
]
ROUTED = RoutingCall(enabled=True, seed=3)


@pytest.fixture
def inputs():
    """Latents, timesteps and labels (5 is the null class)."""
    return torch.randn(3, 3, 8, 8), torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 5, 2])


def gradients(model, inputs):
    model.zero_grad()
    model(*inputs, routing=ROUTED).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# Routing.


def test_at_initialisation_the_output_is_zero_and_every_weight_gets_its_gradient_later(name, inputs):
    model = make_backbone(name, fresh=True).train()
    assert not model(*inputs).sample.any()
    model = make_backbone(name).train()
    found = gradients(model, inputs)
    assert set(found) == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


def test_ratio_zero_is_bitwise_dense_and_evaluation_too(name, inputs):
    model = make_backbone(name).train()
    dense = make_backbone(name, routes=None).train()(*inputs).sample
    assert torch.equal(model(*inputs, routing=RoutingCall(selection_ratio=0.0)).sample, dense)
    assert not torch.equal(model(*inputs, routing=ROUTED).sample, dense)
    assert torch.equal(model.eval()(*inputs).sample, dense)


def test_routed_tokens_keep_their_bits(name, inputs):
    model, seen = make_backbone(name).eval(), {}
    for index in (1, 4):
        model.transformer_blocks[index].register_forward_pre_hook(
            lambda block, args, index=index: seen.update({index: args[0]})
        )
    output = model(*inputs, routing=ROUTED, return_prefix=True)
    (kept,) = output.kept_token_ids
    assert kept.shape == (3, 8) and seen[1].shape[1] == 8
    is_kept = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, kept, True)
    before = output.prefix[..., : seen[4].shape[-1]]  # beside it, what the first block made
    assert torch.equal(seen[4][~is_kept], before[~is_kept])
    assert (seen[4] != before).any(dim=-1)[is_kept].all()


def test_a_sample_does_not_depend_on_the_batch_around_it(name, inputs):
    model = make_backbone(name).eval()
    routing = RoutingCall(enabled=True, seed=torch.tensor([5, 6, 7]))
    together = model(*inputs, routing=routing).sample
    alone = model(*(one[1:2] for one in inputs), routing=RoutingCall(enabled=True, seed=torch.tensor([6]))).sample
    torch.testing.assert_close(alone, together[1:2], atol=1e-4, rtol=1e-4)


def test_branches_share_a_prefix_with_the_same_bits(name, inputs):
    model = make_backbone(name).eval()
    strong = model(*inputs, return_prefix=True)
    weak = model(*inputs, routing=ROUTED, prefix=strong.prefix).sample
    assert torch.equal(weak, model(*inputs, routing=ROUTED).sample)


def delayed(name):
    """Blocks 3 and 4 for half of the tokens, whose other half comes back in the state before block 1."""
    return route_of(name, 3, 4) | {"rejoin_from": 1}


def looped(model, inputs, ids, route):
    """The tokens after the last block, by a loop over blocks that takes out and puts back one token at a time."""
    calls = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda block, args: calls.append(args))
    model(*inputs)
    hook.remove()
    ((tokens, *arguments),) = calls
    all_tokens = tokens.shape[1]

    def kept(value):
        """Of what has an entry for each token those of the kept ones."""
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != all_tokens:
            return value
        value = value.expand(len(ids), *value.shape[1:])
        return torch.stack(
            [torch.stack([row[token] for token in tokens]) for row, tokens in zip(value, ids, strict=True)]
        )

    states = []
    for index, block in enumerate(model.transformer_blocks):
        states.append(tokens)
        inside = route["start"] <= index <= route["end"]
        tokens = kept(tokens) if index == route["start"] else tokens
        tokens = block(tokens, *(kept(one) if inside else one for one in arguments))
        if isinstance(tokens, tuple):  # the first values, made by the first block
            tokens, made = tokens
            arguments[-1] = made if index == 0 else arguments[-1]
        if index == route["end"]:
            rows = [list(early.unbind()) for early in states[route["rejoin_from"]]]
            for sample, row in enumerate(rows):
                for place, token in enumerate(ids[sample].tolist()):
                    row[token] = tokens[sample, place]
            tokens = torch.stack([torch.stack(row) for row in rows])
    return tokens


def test_a_delayed_route_equals_a_loop_with_its_gradients(name):
    model = make_backbone(name, num_layers=7, routes=[delayed(name)]).train()
    inputs = torch.randn(2, 3, 8, 12), torch.tensor([10.0, 900.0]), torch.tensor([5, 2])  # 24 tokens, not D = 16

    def gradients_of(tokens):
        model.zero_grad()
        tokens.square().mean().backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    (kept,) = model(*inputs, routing=ROUTED).kept_token_ids
    assert kept.shape == (2, 12)
    expected = looped(model.eval(), inputs, kept, delayed(name))
    expected_gradients = gradients_of(expected)
    for checkpointing in (False, True):
        model.train().gradient_checkpointing = checkpointing
        found = model(*inputs, routing=ROUTED, hidden_states_at=(6,)).hidden_states[6]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert_same_gradients(gradients_of(found), expected_gradients, 1e-4)

    plain = make_backbone(name, num_layers=7, routes=[route_of(name, 3, 4)]).train()
    other = plain(*inputs, kept_token_ids=[kept], hidden_states_at=(6,)).hidden_states[6]
    assert (other - expected).norm() > 0.01 * expected.norm()


def test_the_backward_keeps_an_earlier_state_anyway(name, inputs):
    """So that holding it takes no memory in training."""
    model, states, kept = make_backbone(name, num_layers=7, routes=[delayed(name)]).train(), [], []
    model.transformer_blocks[1].register_forward_pre_hook(lambda block, args: states.append(args[0]))

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs, routing=ROUTED)
    assert states[0].data_ptr() in [tensor.data_ptr() for tensor in kept]


def test_a_delayed_route_is_dense_in_evaluation_and_shares_its_prefix(name, inputs):
    model = make_backbone(name, num_layers=7, routes=[delayed(name)]).eval()
    plain = make_backbone(name, num_layers=7, routes=[route_of(name, 3, 4)]).eval()
    strong = model(*inputs, return_prefix=True)
    assert torch.equal(strong.sample, plain(*inputs).sample)
    assert strong.prefix.shape[2] == plain(*inputs, return_prefix=True).prefix.shape[2] + 16

    weak = model(*inputs, routing=ROUTED, prefix=strong.prefix).sample
    assert torch.equal(weak, model(*inputs, routing=ROUTED).sample)
    assert not torch.equal(weak, plain(*inputs, routing=ROUTED).sample)


def test_other_image_sizes_work(name):
    model = make_backbone(name).eval()
    latents, timestep = torch.randn(1, 3, 12, 16), torch.tensor([100.0])
    with torch.no_grad():
        assert model(latents, timestep, routing=ROUTED).sample.shape == latents.shape


def test_routing_saves_what_its_share_of_the_blocks_costs(name):
    model = make_backbone(name)
    assert 1.1 < flop_ceiling(model) < 2
    assert training_flops(model) < training_flops(model, selection_ratio=0.0)
    guider = SparseGuidance(strong_ratio=0.25, weak_ratio=0.75)
    assert guidance_flops(model, guider).share_of_cfg < 1


# What diffusers users do with a model.


def test_checkpointing_gives_the_same_gradients(name, inputs):
    model = make_backbone(name).train()
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    found = gradients(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_compiled_step_equals_an_eager_one_for_every_seed(name, inputs):
    torch._dynamo.reset()
    model = make_backbone(name, num_layers=4, routes=[route_of(name, 1, 1)]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        routing = RoutingCall(seed=seed)
        expected = model(*inputs, routing=routing).sample
        with torch.compiler.set_stance("default" if seed == 1 else "fail_on_recompile"):
            found = compiled(*inputs, routing=routing).sample
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_is_near_float32(name, inputs, tmp_path):
    model = make_backbone(name).eval()
    expected = model(*inputs, routing=ROUTED).sample
    model.save_pretrained(tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs, routing=ROUTED).sample
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    found = half(inputs[0].bfloat16(), *inputs[1:], routing=ROUTED).sample
    assert (mixed.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    for one in (mixed, found.float()):
        assert (one - expected).norm() < 0.1 * expected.norm()


def test_layerwise_casting_stores_blocks_in_fp8(name, inputs):
    model = make_backbone(name).eval()
    expected = model(*inputs, routing=ROUTED).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {parameter.dtype for parameter in model.transformer_blocks.parameters()}
    assert torch.float8_e4m3fn in stored and model.proj_out.weight.dtype == torch.float32
    with torch.no_grad():
        found = model(*inputs, routing=ROUTED).sample
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_an_adapter_on_all_linear_layers_trains_alone(name, inputs):
    model = make_backbone(name).train()
    expected = model(*inputs, routing=ROUTED).sample
    inner = {part.split(".")[-1] if not part[-1].isdigit() else part for part, module in
             model.transformer_blocks[0].named_modules() if isinstance(module, torch.nn.Linear)}  # fmt: skip
    model.add_adapter(LoraConfig(r=2, target_modules=sorted(inner), init_lora_weights=False))
    found = gradients(model, inputs)
    assert found and all(".lora_" in one for one in found)
    model.delete_adapters("default")
    assert torch.equal(model(*inputs, routing=ROUTED).sample, expected)


def test_blocks_are_not_split_and_are_repeated(name):
    model = make_backbone(name)
    kinds = {type(block).__name__ for block in model.transformer_blocks}
    assert sorted(kinds) == model._no_split_modules == model._repeated_blocks  # all of them: FSDP refuses others


def test_sizes_without_anything_are_refused(name):
    width = "hidden_size" if "hidden_size" in make_backbone(name).config else "num_attention_heads"
    with pytest.raises(ValueError, match="Expected a width divisible by 4, at least 4"):
        make_backbone(name, **{width: 0})
    with pytest.raises(ValueError, match="Expected num_layers >= 1"):
        make_backbone(name, num_layers=0, routes=None)


def test_routing_by_hooks_is_refused(name):
    with pytest.raises(ValueError, match="routes by itself"):
        apply_token_routing(make_backbone(name), TokenRoute(start=1, end=2))


def test_presets_are_known_by_name(name):
    kind = type(make_backbone(name))
    with torch.device("meta"):
        model = make_denoiser(kind.presets()[0], sample_size=16, num_classes=3)
    assert type(model) is kind and model.config.num_classes == 3 and model.token_router.routes


# All the way.


@pytest.fixture
def pipe(name):
    pipeline = TREADPipeline(make_backbone(name), FlowMatchEulerDiscreteScheduler(), guider=SparseGuidance())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline([3, 1], num_inference_steps=2, generator=generators, output_type="latent").images


def test_an_export_loads_by_its_own_code(name, pipe, tmp_path):
    pipe.scheduler = FlowSDEScheduler()
    folder, expected = export_for_hub(pipe, tmp_path / "hub"), sample(pipe)
    module = type(pipe.transformer).__module__.rpartition(".")[2]
    assert "\nfrom diffusers_tread" not in (folder / f"transformer/{module}.py").read_text()
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded.transformer).__module__.startswith("diffusers_modules.")
    assert type(loaded.scheduler).__module__.startswith("diffusers_modules.")
    torch.testing.assert_close(sample(loaded), expected, atol=1e-4, rtol=1e-4)


def test_a_training_resumes_with_every_bit(name, tmp_path, fresh_accelerate):
    class_name, config = BACKBONES[name]
    config = SHARED | config | {"in_channels": 1, "num_classes": 10, "routes": [route_of(name)]}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"_class_name": class_name, **config}))
    argv = ["--output_dir", tmp_path / "run", "--max_train_steps", 4, "--model_config_name_or_path", path]
    argv += ["--checkpointing_steps=2", "--validation_steps=99", "--report_to=none"]

    def weights():
        train_tread.main([*map(str, argv)])
        return TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline").transformer.state_dict()

    expected = weights()
    for part in ("pipeline", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / part)
    found = weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
