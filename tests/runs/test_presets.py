# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The recipes: as docs/imagenet.md describes them, and below what the command line says."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from accelerate.commands.config.config_args import load_config_from_file

from diffusers_tread.flops import forward_flops
from diffusers_tread.models import make_denoiser
from diffusers_tread.runs import setup
from diffusers_tread.runs.presets import BORROWED, DIGITS, RECIPES, parse_train_config


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


# | `recipe` | steps x batch | rate, beta2, clip | times | aligned block | the source's FID |
GUIDE = {
    row[0]: row[1:]
    for row in re.findall(
        r"^\| `(\w+)` \| ([\d,]+) x ([\d,]+) \| (\S+), (\S+), (\S+) \| [^|]+ \| (\S+) \| (.*) \|$",
        (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}
# Of a borrowed recipe: what the network sees, the tokens, and the objective's fields.
RESOLVED = {
    "imagenet256_srdit_b1": (32, 16, 256, {"weighting_scheme": "uniform", "shift": 2**0.5}),
    "imagenet256_lightningdit_xl1": (32, 16, 256, {"weighting_scheme": "logit_normal", "logit_mean": 0.0}),
    "imagenet256_repa_xl2": (4, 32, 256, {"weighting_scheme": "uniform", "shift": 1.0}),
    "imagenet256_jit_b16": (3, 256, 256, {"logit_mean": 0.8, "logit_std": 0.8, "shift": 1.0}),
}


@pytest.mark.parametrize("name", BORROWED)
def test_a_borrowed_recipe_resolves_without_data_or_network(name, fresh_accelerate):
    channels, size, num_tokens, fields = RESOLVED[name]
    config, recipe = parse_train_config(["--recipe", name, "--dry_run"]), BORROWED[name]
    accelerator = setup.make_accelerator(config)
    source = setup.open_data(config, accelerator)
    objective = setup.make_objective(config, source)
    with init_empty_weights():
        model = setup.make_model(config, source)
        setup.describe_run(config, accelerator, source, model)
    assert (model.config.in_channels, model.config.sample_size) == (channels, size)
    assert (size // model.config.patch_size) ** 2 == num_tokens
    assert all(getattr(objective, field) == pytest.approx(value) for field, value in fields.items())
    (route,) = model.token_router.routes
    assert (route.start, route.end) == (2, model.config.num_layers - 4)
    # The guide's line of settings.
    steps, batch, rate, beta2, clip, aligned, fids = GUIDE[name]
    assert (float(rate), float(beta2), float(clip.replace("-", "0"))) == (
        *(config.learning_rate, config.adam_beta2, config.max_grad_norm),
    )
    assert (int(steps.replace(",", "")), int(batch.replace(",", ""))) == (
        *(config.max_train_steps, 8 * config.train_batch_size),
    )
    assert (json.loads(config.loss_terms) == {}) == (aligned == "-")
    assert aligned == "-" or json.loads(config.loss_terms)["alignment"]["blocks"] == [int(aligned)]
    assert f"{recipe.source_fid:g}" in fids


def test_a_preset_s_settings_can_be_changed():
    flags = ["--data", "folder:none", "--resolution", "64", "--num_classes", "3", "--preset", "B/4", "--dry_run"]
    config = parse_train_config([*flags, "--preset_config", '{"patch_bottleneck_dim": 24, "norm": "rms_norm"}'])
    with init_empty_weights():
        model = setup.make_model(config, setup.UnseenSource(config))
    assert model.patch_embedding[0].weight.shape == (24, 3, 4, 4) and model.config.norm == "rms_norm"
    for changes, message in (('{"depth": 3}', "settings of B/4.*'depth'"), ('{"in_channels": 4}', "in_channels=3")):
        config = parse_train_config([*flags, "--preset_config", changes])
        with pytest.raises(ValueError, match=message), init_empty_weights():
            setup.make_model(config, setup.UnseenSource(config))
    with pytest.raises(ValueError, match="Expected --preset with --preset_config"):
        parse_train_config(["--model_config_name_or_path", "{}", "--preset_config", "{}"])


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
