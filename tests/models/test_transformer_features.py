# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Every feature of a diffusers model works on ours, routed and dense."""

import copy
import json

import pytest
import torch
import torch.nn as nn
from accelerate import infer_auto_device_map
from accelerate.utils import compare_versions
from diffusers import attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from diffusers_tread import RoutingCall, TREADTransformer2DModel, get_token_router, token_routing
from diffusers_tread.models.transformer_tread_2d import TREADAttnProcessor


LORA = LoraConfig(r=2, target_modules=["to_qkv", "to_out.0"], init_lora_weights=False)


@torch.no_grad()
def outputs(model, inputs):
    """The dense and the routed output."""
    latents = inputs[0].to(model.dtype)
    with token_routing(model, enabled=True, seed=3):
        routed = model(latents, *inputs[1:]).sample
    with token_routing(model, enabled=False):
        return torch.stack([model(latents, *inputs[1:]).sample, routed])


def assert_near(found, expected, tolerance):
    assert (found.float() - expected).norm() < tolerance * expected.norm()
    assert not torch.equal(found[0], found[1])


# Saving and loading.


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "20KB"}, {"variant": "ema"}, {"safe_serialization": False}]
)
def test_a_saved_model_loads_with_every_bit(make_model, inputs, tmp_path, options):
    routes = [{"start": 1, "end": 2, "rejoin": "sum", "magnitude_mix": 0.5}]
    model = make_model(objective="flow", timestep_scale=2.0, routes=routes).eval()
    model.save_pretrained(tmp_path, **options)
    names = [path.name for path in tmp_path.iterdir()]
    assert sum("-of-" in name for name in names) > 2 if "max_shard_size" in options else len(names) == 2
    assert all("ema" in name for name in names if name != "config.json") or "variant" not in options

    loaded = TREADTransformer2DModel.from_pretrained(tmp_path, variant=options.get("variant"))
    assert not loaded.training
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    stored = [{key: m.config[key] for key in m.config if not key.startswith("_")} for m in (loaded, model)]
    assert stored[0] == stored[1]
    assert get_token_router(loaded).routes == get_token_router(model).routes


def test_the_config_alone_gives_the_same_architecture(make_model):
    options = {"rejoin": "sum", "magnitude_mix": -0.5}
    model = make_model(routes=[{"start": 0, "end": -4, "selection_ratio": 0.75, **options}])
    twin = TREADTransformer2DModel.from_config(json.loads(model.to_json_string()))
    assert get_token_router(twin).routes == get_token_router(model).routes
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert TREADTransformer2DModel.from_config(make_model(routes=None).config).config.routes is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_near_fp32(model, inputs, tmp_path, dtype, tolerance):
    model.save_pretrained(tmp_path)
    loaded = TREADTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    cast = copy.deepcopy(model).to(dtype)
    for size in ((8, 8), (8, 12)):
        inputs = torch.randn(3, 3, *size), *inputs[1:]
        found = outputs(loaded, inputs)
        assert found.dtype == dtype and torch.equal(found, outputs(cast, inputs))
        assert_near(found, outputs(model, inputs), tolerance)


@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": False}],
)
def test_every_way_to_place_weights_loads_the_same_model(model, inputs, tmp_path, options):
    model.save_pretrained(tmp_path)
    loaded = TREADTransformer2DModel.from_pretrained(tmp_path, **options)
    assert hasattr(loaded, "hf_device_map") == ("device_map" in options)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_blocks_may_stay_on_disk(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    for index in range(6):
        device_map[f"transformer_blocks.{index}"] = "disk" if index % 2 else "cpu"
    loaded = TREADTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_a_device_map_never_splits_a_block(make_model):
    model = make_model()
    size = sum(p.numel() for p in model.transformer_blocks[0].parameters()) * 4
    for fraction in (1.5, 2.5, 3.5):
        device_map = infer_auto_device_map(
            model,
            max_memory={0: int(fraction * size), 1: int(fraction * size), "cpu": 10**9},
            no_split_module_classes=model._no_split_modules,
        )
        assert len(set(device_map.values())) > 1
        assert not any(name.startswith("transformer_blocks.") and name.count(".") > 1 for name in device_map)


def test_an_ema_model_keeps_its_own_routing_and_leaves_the_config(make_model, inputs, tmp_path):
    model = make_model().train()
    config = dict(model.config)
    twin = copy.deepcopy(model).eval()
    ema = EMAModel(twin.parameters(), decay=0.5, model_cls=TREADTransformer2DModel, model_config=twin.config)
    ema.step(model.parameters())
    get_token_router(twin).defaults = RoutingCall(selection_ratio=0.75)
    assert get_token_router(model).defaults.selection_ratio is None
    assert dict(model.config) == dict(twin.config) == config

    ema.save_pretrained(tmp_path)
    assert dict(model.config) == config
    loaded = TREADTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert get_token_router(loaded).routes == get_token_router(model).routes


# Memory.


# Older releases read the accelerator's type without asking whether there is one.
needs_accelerator = compare_versions("diffusers", "<", "0.42") and not torch.accelerator.is_available()


has_none = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


@pytest.mark.parametrize("on", ["cpu", pytest.param("accelerator", marks=[pytest.mark.gpu, has_none])])
@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 2}, {"offload_type": "leaf_level"}]
)
def test_group_offloading_to_the_cpu_gives_the_same_output(model, inputs, options, on):
    if on == "cpu" and needs_accelerator:
        pytest.skip("group offloading of this diffusers needs an accelerator")
    device = torch.device("cpu") if on == "cpu" else torch.accelerator.current_accelerator()
    model, inputs = model.to(device), [tensor.to(device) for tensor in inputs]
    expected = outputs(model, inputs)
    model.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **options)
    assert torch.equal(outputs(model, inputs), expected)


@has_none
@pytest.mark.gpu
def test_the_subset_is_the_same_on_every_device(make_model):
    router = get_token_router(make_model())
    router.defaults = RoutingCall(seed=3)
    tokens = torch.empty(8, 1024, 1)
    (expected,) = router.plan(tokens, training=True)
    (found,) = router.plan(tokens.to(torch.accelerator.current_accelerator()), training=True)
    assert torch.equal(found.cpu(), expected)


def test_layerwise_casting_stores_blocks_in_fp8_and_the_ends_in_bf16(model, inputs):
    expected = outputs(model, inputs)
    model.to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        ends = ("patch_embedding", "timestep_embedding", "class_embedding", "proj_out")
        assert parameter.dtype == (torch.bfloat16 if name.startswith(ends) else torch.float8_e4m3fn), name
    with token_routing(model, enabled=True, seed=3), torch.no_grad():
        routed = model(inputs[0].bfloat16(), *inputs[1:]).sample
    assert routed.dtype == torch.bfloat16
    assert (routed.float() - expected[1]).norm() < 0.15 * expected[1].norm()


# Attention.


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_agree(model, inputs, backend):
    expected = outputs(model, inputs)
    model.set_attention_backend(backend)
    assert {p._attention_backend.value for p in model.attn_processors.values()} == {backend}
    torch.testing.assert_close(outputs(model, inputs), expected, atol=1e-4, rtol=1e-4)
    model.reset_attention_backend()
    with attention_backend(backend):
        torch.testing.assert_close(outputs(model, inputs), expected, atol=1e-4, rtol=1e-4)


class SilentProcessor(TREADAttnProcessor):
    """Attention that adds nothing."""

    def __call__(self, attn, hidden_states):
        return torch.zeros_like(super().__call__(attn, hidden_states))


def test_an_attention_processor_can_be_replaced(model, inputs):
    expected, processors = outputs(model, inputs), dict(model.attn_processors)
    assert len(processors) == 6
    silent = copy.deepcopy(model)
    for block in silent.transformer_blocks:
        nn.init.zeros_(block.attn.to_out[0].weight)
        nn.init.zeros_(block.attn.to_out[0].bias)

    model.set_attn_processor(SilentProcessor())
    assert torch.equal(outputs(model, inputs), outputs(silent, inputs))
    model.set_attn_processor(processors)
    assert torch.equal(outputs(model, inputs), expected)


def test_query_key_and_value_are_fused_from_the_start(model, inputs):
    expected, keys = outputs(model, inputs), set(model.state_dict())
    model.fuse_qkv_projections()
    assert set(model.state_dict()) == keys
    model.unfuse_qkv_projections()
    assert set(model.state_dict()) == keys
    assert torch.equal(outputs(model, inputs), expected)


# LoRA.


def test_only_an_adapter_trains_and_deleting_it_restores_the_model(make_model, inputs):
    model = make_model().train()
    expected = outputs(model, inputs)
    model.add_adapter(LORA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6 * 2 * 2 and all(".lora_" in name for name in trained)

    model(*inputs).sample.square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert not torch.allclose(outputs(model, inputs), expected)
    model.disable_adapters()
    assert torch.equal(outputs(model, inputs), expected)
    model.enable_adapters()
    model.delete_adapters("default")
    assert torch.equal(outputs(model, inputs), expected)


def test_a_saved_adapter_loads(make_model, inputs, tmp_path):
    model, plain = make_model().eval(), make_model().eval()
    model.add_adapter(LORA)
    model.save_lora_adapter(tmp_path)
    plain.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(outputs(plain, inputs), outputs(model, inputs))


def test_a_merged_adapter_gives_the_same_output(model, inputs):
    model.add_adapter(LORA)
    expected = outputs(model, inputs)
    model.fuse_lora()
    torch.testing.assert_close(outputs(model, inputs), expected, atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(outputs(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_trains_the_same_with_checkpointing(make_model, inputs):
    model = make_model().train()
    model.add_adapter(LORA)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with token_routing(model, seed=3):
            model(*inputs).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
