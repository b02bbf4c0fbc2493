# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from diffusers_tread.runs.parsing import config_flags, read_json


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
