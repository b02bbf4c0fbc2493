# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""LightningDiT's published layout: parity with its formulas, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from closeness import difference, rounding

from diffusers_tread.converters import convert_checkpoint, export_dit


sys.path.insert(0, str(Path(__file__).parent))
from dit_formulas import as_lightningdit, dit, random_dit  # noqa: E402


# Six blocks of width 32, with 85 in the MLP and 16 tokens.
LIMIT = rounding(6 * 312)
LABELS = torch.tensor([0, 5, 2])


def lightningdit(**options):
    """Four heads of eight channels."""
    return as_lightningdit(random_dit(patch=1), heads=4, **options)


@pytest.fixture
def convert(tmp_path):
    def convert(content, **options):
        torch.save(content, tmp_path / "checkpoint.pt")
        settings = {"source": "lightningdit", "num_classes": 5} | options
        return convert_checkpoint(tmp_path / "checkpoint.pt", **settings)

    return convert


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_a_converted_network_gives_the_source_s_output_at_its_time(convert, qk_norm):
    weights, times = lightningdit(qk_norm=qk_norm), torch.tensor([0.0, 0.3, 1.0])
    latents = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    transformer = convert({"ema": weights}).transformer
    found = transformer(latents, 1000 * (1 - times), LABELS).sample.double()
    assert difference(found, -dit(weights, latents, times, LABELS, heads=4)) < LIMIT
    expected = {
        "num_attention_heads": 4, "attention_head_dim": 8, "mlp_ratio": 4.0, "patch_size": 1, "sample_size": 4,
        "norm": "rms_norm", "qk_norm": "rms_norm" if qk_norm else None, "ffn": "swiglu", "positions": "sincos+rope",
        "value_residual": False, "objective": "flow", "routes": None,
    }  # fmt: skip
    assert {name: transformer.config[name] for name in expected} == expected


def test_the_options_are_told_by_names_and_can_come_alone(convert):
    """RMSNorm alone, as a model trained without the others has it, and another width of SwiGLU."""
    plain = random_dit(patch=1)
    norms = {name: tensor for name, tensor in lightningdit().items() if ".norm" in name}
    config = convert(plain | norms, num_attention_heads=4).transformer.config
    assert (config.norm, config.qk_norm, config.ffn, config.positions) == (
        "rms_norm", None, "gelu-approximate", "sincos"
    )  # fmt: skip
    assert convert(lightningdit(hidden=50)).transformer.config.mlp_ratio == 75 / 32


def test_the_settings_of_its_training_are_read(convert):
    config = {"data": {"num_classes": 5}, "transport": {"path_type": "Linear", "prediction": "velocity"}}
    assert convert({"ema": lightningdit(), "config": config}, num_classes=None).transformer.config.num_classes == 5
    config["transport"]["prediction"] = "noise"
    with pytest.raises(ValueError, match="Expected a velocity on the linear path, got .*'noise'"):
        convert({"ema": lightningdit(), "config": config})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.update({"blocks.0.attn.q_norm.bias": torch.ones(8)}), r"unknown: \['blocks.0.attn.q_norm.bias"),
        (lambda w: w.pop("blocks.2.mlp.w3.bias"), "Missing: .*blocks.2.mlp.w3.bias"),
        (lambda w: w.update({"feat_rope.freqs_sin": w["feat_rope.freqs_cos"]}), "feat_rope.freqs_sin to be the sine"),
        (lambda w: w.update({"blocks.1.norm1.weight": torch.ones(32, 1)}), "Expected weights in floating point"),
        # Without shifts (`wo_shift`) a block's modulation has four parts.
        (lambda w: w.update({"blocks.0.adaLN_modulation.1.bias": torch.zeros(128)}), "size mismatch for"),
    ],
)  # fmt: skip
def test_wrong_weights_are_named(convert, change, message):
    weights = lightningdit()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert(weights)


def test_a_lightningdit_is_not_exported_as_a_dit(convert):
    with pytest.raises(ValueError, match="DiT's settings .* got .*'norm': 'rms_norm'"):
        export_dit(convert(lightningdit()).transformer)
