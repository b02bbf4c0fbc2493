# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The recipes in examples/configs: readable, and as docs/imagenet.md describes them."""

import json
import re
from pathlib import Path

import precompute_latents
import pytest
import train_tread
from accelerate import init_empty_weights
from accelerate.commands.config.config_args import load_config_from_file

from diffusers_tread import TREADTransformer2DModel
from diffusers_tread.flops import forward_flops


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
TRAINING = sorted(path.stem for path in CONFIGS.glob("*.json") if not path.stem.endswith("_latents"))
LATENTS = sorted(path.stem for path in CONFIGS.glob("*_latents.json"))
# | `config` | tokens | parameters | dense → routed | dense → routed | FID | run |
ROWS = {
    match[1]: [float(number) for number in match.groups()[1:]]
    for match in re.finditer(
        r"^\| `(\w+)` \| (\d+) \| (\d+)M \| ([\d.]+) → ([\d.]+) \| (\d+) → (\d+) \|",
        (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_config_is_read_and_the_command_line_wins(name):
    path = CONFIGS / f"{name}.json"
    args = train_tread.parse_args(["--config", str(path), "--no-use_ema"])
    content = json.loads(path.read_text())
    assert args.learning_rate == content["learning_rate"] and content["use_ema"] and not args.use_ema


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "digits"])
def test_the_table_of_recipes_states_the_size_and_the_flops(name):
    args = train_tread.parse_args(["--config", str(CONFIGS / f"{name}.json")])
    if args.latents_dir is not None:
        latents = precompute_latents.parse_args(
            ["--config", str(CONFIGS / f"{args.latents_dir.split('-')[0]}_latents.json")]
        )
        assert latents.output_dir == args.latents_dir and latents.flip == args.random_flip
        channels, size = 4, latents.resolution // 8
    else:
        channels, size = 3, args.resolution
    with init_empty_weights():
        model = TREADTransformer2DModel.from_preset(
            args.preset, in_channels=channels, sample_size=size, num_classes=1000, objective=args.objective
        )
    dense, routed = forward_flops(model, selection_ratio=0.0).total, forward_flops(model).total
    tokens = (size // model.config.patch_size) ** 2
    batch = 256
    expected = [
        *(tokens, round(model.num_parameters() / 1e6)),
        *(round(flops / 2e9, 1) for flops in (dense, routed)),
        *(round(3 * batch * flops / 1e12) for flops in (dense, routed)),
    ]
    assert ROWS[name] == expected
    assert args.train_batch_size * 8 == batch  # eight GPUs


@pytest.mark.parametrize("name", LATENTS)
def test_a_latents_config_is_read(name):
    args = precompute_latents.parse_args(["--config", str(CONFIGS / f"{name}.json")])
    assert args.dataset_name == "ILSVRC/imagenet-1k" and args.output_dir == name.replace("_", "-")


def test_every_recipe_is_in_the_table():
    assert sorted(ROWS) == [name for name in TRAINING if name != "digits"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_config_holds_only_what_accelerate_knows(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and not config.use_cpu
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
