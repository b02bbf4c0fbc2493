# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and reports what it measured; how fast a machine is, no test can claim."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffusers_tread
from diffusers_tread import TREADTransformer2DModel


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_holds_what_another_person_needs_to_repeat_it(script, tmp_path):
    path, picture = tmp_path / "results" / "step.json", tmp_path / "step.png"
    flags = ["--presets", "S/8", "--tokens", "4", "--batch_size", "1", "--repeats", "3", "--warmup", "1"]
    script.main([*flags, "--output", str(path), "--plot", str(picture)])
    report = json.loads(path.read_text())

    assert report["command"].startswith("python benchmarks/train_step.py --presets S/8 --tokens 4")
    assert report["hardware"]["cpu"] and report["hardware"]["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["diffusers_tread"] == diffusers_tread.__version__
    assert set(report["source"]) == {"commit", "dirty"}
    assert report["settings"]["seed"] == 0

    (row,) = report["rows"]
    assert row["speedup"] == row["dense_seconds"]["median"] / row["routed_seconds"]["median"]
    assert row["speedup_over_ceiling"] == row["speedup"] / row["flop_ceiling"]
    assert Image.open(picture).format == "PNG"
    assert sorted(file.name for file in path.parent.iterdir()) == ["step.json"]


def test_the_quartiles_are_those_of_the_values(script):
    values = [float(value) for value in range(1, 10)]
    summary = script.summary(values)
    assert (summary["first_quartile"], summary["median"], summary["third_quartile"]) == (3.0, 5.0, 7.0)
    assert (summary["min"], summary["max"]) == (1.0, 9.0)
    assert summary["median"] == statistics.median(values)


def test_a_step_trains_the_model_and_routes_only_when_asked_to(script):
    args = script.parse_args(["--presets", "S/2", "--batch_size", "1", "--selection_ratio", "0.75"])
    step, model = script.make_step("S/2", 16, "eager", args)
    lengths = []
    model.transformer_blocks[4].register_forward_hook(lambda block, inputs, output: lengths.append(output.shape[1]))
    before = model.proj_out.weight.detach().clone()
    step(False)
    step(True)
    assert lengths == [16, 4]
    assert isinstance(model, TREADTransformer2DModel) and model.training
    assert not torch.equal(model.proj_out.weight, before)


@pytest.mark.parametrize(
    "flags",
    [["--tokens", "200"], ["--modes", "fast"], ["--repeats", "1"], ["--batch_size", "0"], ["--presets", "M/2"]],
)
def test_impossible_flags_are_refused(script, flags):
    with pytest.raises(ValueError, match="Expected"):
        script.main(flags)
