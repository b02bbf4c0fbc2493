# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import ast
import dataclasses
import inspect
import itertools
import json
import math
import re

import pytest

from diffusers_tread.runs import config
from diffusers_tread.runs.config import CONTROL_FIELDS, FREE_FIELDS, TrainConfig
from diffusers_tread.runs.parsing import config_flags, parse_config, read_json
from diffusers_tread.runs.presets import parse_train_config
from diffusers_tread.runs.text_config import TextTrainConfig


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A config of every kind of field."""

    rate: float = 0.1
    """Share."""
    steps: int | None = None
    """Number; None for all."""
    flip: bool = False
    """Whether."""
    model: str = "{}"
    """JSON."""

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"Expected --rate >= 0, got {self.rate}.")


def parse(*argv):
    recipes = {"small": {"rate": 0.2, "steps": 3, "flip": True, "model": {"depth": 2}}}
    return parse_config(Config, [*argv], description="Does it.", recipe_settings=recipes.__getitem__)


def test_json_is_read_from_text_file_and_model_folder(tmp_path):
    content = {"num_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_json(' {"num_layers": 6}') == read_json(str(tmp_path)) == read_json(str(tmp_path / "config.json"))
    assert read_json(str(tmp_path)) == content


@pytest.mark.parametrize("source", ["{broken", "no/such/file.json"])
def test_what_is_no_json_object_is_refused(source):
    with pytest.raises(ValueError, match="Expected a JSON object"):
        read_json(source)


def test_a_list_is_no_config(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="got list"):
        read_json(str(tmp_path / "list.json"))


def test_a_config_becomes_flags_and_unknown_names_are_refused():
    text = json.dumps({"rate": -0.5, "ema": True, "flip": False, "limit": None, "model": {"num_layers": 6}})
    known = ["rate", "ema", "flip", "limit", "model"]
    assert config_flags(text, known=known) == ["--rate=-0.5", "--ema", "--no-flip", '--model={"num_layers": 6}']
    with pytest.raises(ValueError, match="limit"):
        config_flags(text, known=known[:3])


def test_flags_come_before_a_config_which_comes_before_a_recipe_which_comes_before_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"rate": 0.3, "steps": 4}')
    config = ["--recipe=small", "--config", str(tmp_path / "config.json")]
    assert parse() == Config()
    assert parse("--recipe", "small") == Config(rate=0.2, steps=3, flip=True, model='{"depth": 2}')
    assert parse(*config) == Config(rate=0.3, steps=4, flip=True, model='{"depth": 2}')
    assert parse("--rate=0.4", *config, "--no-flip") == Config(rate=0.4, steps=4, model='{"depth": 2}')
    assert parse("--rate", "1e-3", "--steps", "None").steps is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rate", "fast"], "float"),
        (["--steps", "1.5"], "int"),
        (["--flip=maybe"], "maybe"),
        (["--stesp", "3"], "--steps"),
        (["--ste", "3"], "--steps"),
        (["3"], "3"),
    ],
)
def test_a_value_of_another_type_and_an_unknown_flag_are_named(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "-1"], "Expected --rate >= 0, got -1.0"),
        (["--config", '{"stesp": 3}'], "stesp"),
        (["--config", "nowhere.json"], "Expected a JSON object"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_config_itself(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_every_field_of_the_training_has_a_docstring_that_help_shows(capsys):
    bodies = [ast.parse(inspect.getsource(kind)).body[0].body for kind in (config.RunConfig, TrainConfig)]
    documented = {
        field.target.id: text.value.value
        for body in bodies
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert list(documented) == list(FIELDS)
    with pytest.raises(SystemExit, match="0"):
        parse_train_config(["--help"], description="Trains.")
    shown = "".join(re.findall(r"[\w.:;,'\"(){}/%-]", capsys.readouterr().out))
    for name, text in documented.items():
        assert f"--{name}" in shown and re.sub(r"[^\w.:;,'\"(){}/%-]", "", text) in shown, name


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (config._POSITIVE, [0, -1]),
        (config._NOT_NEGATIVE, [-1, math.nan]),
        (config._SHARES, [-0.1, 1.1, math.nan]),
        (("adam_beta1", "adam_beta2"), [-0.1, 1.0]),
        (("objective", "lr_scheduler"), ["", "piecewise_constant"]),
    ],
)
def test_a_field_out_of_its_range_is_named(names, values):
    for name, value in itertools.product(names, values):
        with pytest.raises(ValueError, match=f"{name}|objective"):
            TrainConfig(preset="S/2", **{name: value})


def test_the_tables_of_fields_name_fields_and_a_config_is_frozen():
    fields = set(FIELDS) | {field.name for field in dataclasses.fields(TextTrainConfig)}
    assert set(CONTROL_FIELDS) | set(FREE_FIELDS) <= fields
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig(preset="S/2").preset = "B/2"


def test_flags_of_muon_are_for_muon():
    with pytest.raises(ValueError, match=r"--optimizer muon with \['muon_momentum'\], got 'adamw'"):
        TrainConfig(preset="S/2", muon_momentum=0.5)
    assert TrainConfig(preset="S/2", muon_momentum=0.5, optimizer="muon").muon_momentum == 0.5
