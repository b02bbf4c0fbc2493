# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from backbones import BACKBONES, make_backbone
from tiny_pipelines import PIPELINES
from torch import nn

from diffusers_tread.runs.config import RunConfig
from diffusers_tread.runs.lora import LoraTrainConfig
from diffusers_tread.runs.optimizers import find_matrices, make_optimizer
from diffusers_tread.runs.setup import make_lr_scheduler


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")


class Attention(nn.Module):
    """A stack of one layer, which has the rows of query, key and value of width 12 for tokens of width 16."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(16, 36)
        self.to_out = nn.Linear(12, 16, bias=False)
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_qkv": self.to_qkv, "to_out": self.to_out})])


def newton_schulz(matrix):
    """Five iterations of the quintic of https://kellerjordan.github.io/posts/muon/, in float64."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_by_hand(weight, gradients, *, rate, momentum, decay, scale):
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        nesterov = momentum * average + (1 - momentum) * gradient
        weight = weight - rate * decay * weight - rate * scale * newton_schulz(nesterov)
    return weight


@needs_muon
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_the_formula_on_query_key_and_value_each_and_adamw_trains_the_bias(adjust):
    model, rate = Attention(), 0.5
    flags = {"muon_learning_rate": rate, "muon_weight_decay": 0.1, "muon_adjust_lr_fn": adjust, "learning_rate": 0.01}
    optimizer = make_optimizer(RunConfig(optimizer="muon", **flags), model)
    before = {name: one.detach().double().numpy().copy() for name, one in model.named_parameters()}
    gradients = {name: torch.randn(2, *one.shape) for name, one in model.named_parameters()}
    for step in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()

    # torch iterates in bfloat16: hundredths of a matrix's entries, which are about 1 / 4 here.
    told = {"rate": rate, "momentum": 0.95, "decay": 0.1}
    thirds = [slice(0, 12), slice(12, 24), slice(24, 36)]
    for name, parts, scales in (
        ("to_qkv.weight", thirds, (1.0, 0.2 * 16**0.5)),
        ("to_out.weight", [slice(None)], ((16 / 12) ** 0.5, 0.2 * 16**0.5)),
    ):
        scale = scales[adjust != "original"]
        steps = gradients[name].double().numpy()
        expected = [muon_by_hand(before[name][part], steps[:, part], scale=scale, **told) for part in parts]
        found = model.get_parameter(name).detach().numpy()
        tolerance = 0.05 * rate * scale
        assert np.abs(found - np.concatenate(expected)).max() < tolerance
        if len(parts) == 3:  # all at once is another step
            whole = muon_by_hand(before[name], steps, scale=scale, **told)
            assert np.abs(found - whole).max() > 3 * tolerance

    bias = torch.nn.Parameter(torch.from_numpy(before["to_qkv.bias"]).float())
    adamw = torch.optim.AdamW([bias], lr=0.01, weight_decay=0.0)
    for gradient in gradients["to_qkv.bias"]:
        bias.grad = gradient
        adamw.step()
    torch.testing.assert_close(model.to_qkv.bias, bias)


# By the end of its name what Muon trains in a block, and into how many matrices it is cut.
IN_BLOCKS = {
    "transformer": {"attn.to_qkv": 3, "attn.to_out.0": 1, "ff.net.0.proj": 1, "ff.net.2": 1},
    "mamba": {"mixer.in_proj": 1, "mixer.out_proj": 1},
    "rwkv": {f"spatial_mix.{name}": 1 for name in ("receptance", "key", "value", "output")}
    | {f"channel_mix.{name}": 1 for name in ("receptance", "key", "value")},
    "prx": {"attention.img_qkv_proj": 3, "attention.txt_kv_proj": 2, "attention.to_out.0": 1}
    | {f"{name}_proj": 1 for name in ("gate", "up", "down")},
}
IN_BLOCKS["modern transformer"] = IN_BLOCKS["transformer"]
_STREAM = {f"attn.{name}": 1 for name in ("to_q", "to_k", "to_v", "to_out.0")} | {"ff.net.0.proj": 1, "ff.net.2": 1}
_CONTEXT = {f"attn.{name}": 1 for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
_CONTEXT |= {"ff_context.net.0.proj": 1, "ff_context.net.2": 1}
IN_BLOCKS["sd3"] = _STREAM | _CONTEXT
IN_BLOCKS["flux"] = _STREAM | _CONTEXT | {"proj_mlp": 1, "proj_out": 1}


@pytest.fixture(params=[*BACKBONES, *PIPELINES])
def model(request, tmp_path):
    if request.param in BACKBONES:
        return request.param, make_backbone(request.param)
    denoiser = nn.Module()  # as PipelineDenoiser holds it
    denoiser.transformer = PIPELINES[request.param](tmp_path).transformer
    return request.param, denoiser


@needs_muon
def test_muon_trains_attention_and_mlp_of_the_blocks_and_adamw_all_else(model):
    name, model = model
    found, blocks = find_matrices(model), {}
    for weight, rows in found.items():
        stack, _, inner = weight.removeprefix("transformer.").partition(".")
        number, _, layer = inner.removesuffix(".weight").partition(".")
        blocks.setdefault((stack, number), {})[layer] = 1 if rows is None else len(rows)
        assert rows is None or sum(rows) == len(model.get_parameter(weight))
    assert {layer: count for block in blocks.values() for layer, count in block.items()} == IN_BLOCKS[name]
    stacks = [blocks[key] for key in blocks if key[0] != "single_transformer_blocks"]
    # The last text stream of SD3 ends before its MLP.
    assert len(stacks) >= 2 and all(block == stacks[0] for block in stacks[: -1 if name == "sd3" else None])

    optimizer = make_optimizer(RunConfig(optimizer="muon", adam_weight_decay=0.1), model)
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert ("rows" in groups[id(parameter)]) == (name in found)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
@pytest.mark.parametrize("name", BACKBONES)
def test_only_matrices_and_kernels_decay(name, optimizer):
    model = make_backbone(name)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    flags = {"learning_rate": 0.5, "adam_weight_decay": 0.1}
    flags |= {"muon_learning_rate": 0.5, "muon_weight_decay": 0.1} if optimizer == "muon" else {}
    optimizer = make_optimizer(RunConfig(optimizer=optimizer, **flags), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    layers = (nn.Linear, nn.Conv2d)
    weights = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, layers)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (1 - 0.5 * 0.1) if name in weights else before[name]), name


def test_without_decay_adamw_is_torchs_to_the_bit():
    models = [make_backbone("mamba") for _ in range(2)]
    plain = torch.optim.AdamW(
        models[1].parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, fused=True
    )
    optimizers = [make_optimizer(RunConfig(learning_rate=1e-3), models[0]), plain]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):
            sum(one.square().sum() for one in model.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@needs_muon
@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_both_rates_follow_the_schedule(schedule):
    config = RunConfig(optimizer="muon", muon_learning_rate=0.02, learning_rate=0.001, lr_scheduler=schedule)
    optimizer = make_optimizer(config, make_backbone("transformer"))
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    make_lr_scheduler(config, optimizer, settings, step=5, max_steps=10)
    rates = {"rows" in group: group["lr"] for group in optimizer.param_groups}
    assert rates[True] == pytest.approx(20 * rates[False]) and rates[False] == pytest.approx(0.0005, rel=1e-3)


def test_an_old_torch_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="Expected torch >= 2.9.*Upgrade torch, or use --optimizer adamw"):
        make_optimizer(RunConfig(optimizer="muon"), make_backbone("transformer"))


@needs_muon
def test_what_muon_cannot_train_is_refused():
    with pytest.raises(ValueError, match="Expected a model with blocks whose matrices Muon trains, got Linear"):
        make_optimizer(RunConfig(optimizer="muon"), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Expected --optimizer among \['adamw', 'muon'.*\], got 'sgd'"):
        make_optimizer(RunConfig(optimizer="sgd"), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="for a LoRA, got 'muon'"):
        LoraTrainConfig(optimizer="muon", pretrained_model_name_or_path="a/b")
    with pytest.raises(ValueError, match=r"Expected --muon_momentum in \[0, 1\)"):
        RunConfig(muon_momentum=1.0)
