# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The recipes: as docs/imagenet.md describes them, and below what the command line says."""

import re
from functools import partial
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from accelerate.commands.config.config_args import load_config_from_file

from diffusers_tread.flops import forward_flops
from diffusers_tread.models import make_denoiser
from diffusers_tread.runs.presets import DIGITS, RECIPES, parse_train_config


ROOT = Path(__file__).parents[2]
# | `recipe` | tokens | parameters | dense → routed | dense → routed | FID | run |
ROWS = re.findall(
    r"^\| `(\w+)` \| (\d+) \| (\d+)M \| ([\d.]+) → ([\d.]+) \| (\d+) → (\d+) \| (.*?) \| (yes|no) \|$",
    (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_every_recipe_is_in_the_guide_in_its_order():
    assert [row[0] for row in ROWS] == list(RECIPES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_guide_states_a_recipe_s_size_flops_and_figures(row):
    name, *numbers, figures, was_run = row
    recipe, config = RECIPES[name], parse_train_config(["--recipe", name])
    channels, size = (4, recipe.resolution // 8) if recipe.on_latents else (3, recipe.resolution)
    with init_empty_weights():
        model = make_denoiser(
            config.preset, in_channels=channels, sample_size=size, num_classes=1000, objective=config.objective
        )
    dense, routed = forward_flops(model, selection_ratio=0.0).total, forward_flops(model).total
    expected = [
        *((size // model.config.patch_size) ** 2, round(model.num_parameters() / 1e6)),
        *(round(flops / 2e9, 1) for flops in (dense, routed)),
        *(round(3 * recipe.batch_size * flops / 1e12) for flops in (dense, routed)),
    ]
    assert [float(number) for number in numbers] == expected
    assert config.train_batch_size * 8 == recipe.batch_size  # eight processes
    fids = [float(number) for number in re.findall(r"\d+\.\d+", figures)]
    assert fids == [fid for fid in (recipe.paper_fid_dense, recipe.paper_fid_tread) if fid is not None]
    assert was_run == ("yes" if recipe.was_run else "no")


def test_the_default_config_holds_where_no_data_config_or_recipe_is_named():
    parse = partial(parse_train_config, default_config=DIGITS)
    assert (parse([]).data, parse([]).adam_beta2) == ("digits:", 0.99)
    other = parse(["--data", "folder:photos", "--resolution", "8", "--preset", "S/4"])
    assert (other.data, other.adam_beta2, other.validation_steps) == ("folder:photos", 0.999, None)
    with pytest.raises(ValueError, match="Expected a recipe among .'imagenet256_s2'.*got 'imagenet'"):
        parse(["--recipe", "imagenet"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_an_accelerate_config_holds_only_what_accelerate_knows(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and not config.use_cpu
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
