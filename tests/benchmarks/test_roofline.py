# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The prediction agrees with what is counted elsewhere, with sums by hand, and with itself."""

import json

import pytest
import roofline
import torch
import torch.nn.functional as F
from roofline_operators import Recorder
from torch._subclasses import FakeTensorMode

from diffusers_tread import TREADTransformer2DModel
from diffusers_tread.flops import training_flops


TINY = ["--preset", "S/8", "--tokens", "16", "--batch_size", "3"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Reports as train_step.py and profile_step.py write them."""
    folder = tmp_path_factory.mktemp("measured")
    rows = [{"preset": "S/8", "num_tokens": 16, "batch_size": 3, "mode": mode} for mode in ("eager", "blocks")]
    rows = [row | {"dense_seconds": {"median": 0.3}, "routed_seconds": {"median": 0.2}} for row in rows]
    settings = {"tokens": [16], "batch_size": [3], "dtype": "bfloat16"}
    steps = {"settings": settings, "rows": [*rows, rows[0] | {"preset": "B/8", "dense_seconds": {"median": 9.0}}]}
    kinds = {"linear layers": 0.1, "fused kernels": 0.02, "layer norm": 0.003, "the rest": 0.05}
    profile = {
        "settings": {"preset": "S/8", "tokens": 16, "batch_size": 3, "dtype": "bfloat16"},
        "rows": [{"kind": kind, "dense_seconds": time, "routed_seconds": time / 2} for kind, time in kinds.items()],
    }
    for name, report in (("steps", steps), ("profile", profile)):
        (folder / f"{name}.json").write_text(json.dumps(report))
    return f"{folder / 'steps.json'},{folder / 'profile.json'}"


@pytest.fixture(scope="module", autouse=True)
def tiny_s():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("S/2", "S/8"):
            small = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 6}
            patch.setitem(TREADTransformer2DModel._presets, name, TREADTransformer2DModel._presets[name] | small)
        yield


@pytest.fixture(scope="module")
def report(measured, tmp_path_factory):
    path = tmp_path_factory.mktemp("roofline") / "roofline.json"
    report = roofline.main([*TINY, "--measured", measured, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(report)) and report["is_prediction"]
    return report


def operators_of(function, *shapes):
    with FakeTensorMode():
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        with Recorder() as recorder:
            function(*tensors)
    return recorder.operators()


def test_the_flops_are_the_models(report):
    model = TREADTransformer2DModel.from_preset("S/8", sample_size=32)
    rows = {row["class"]: row for row in report["rows"]}
    for kind, ratio in (("dense", 0.0), ("routed", 0.5)):
        # Fused attention computes one of its seven products again.
        counted = rows["linear layers"][kind]["flops"] + rows["attention"][kind]["flops"] * 6 // 7
        assert counted == 3 * training_flops(model, selection_ratio=ratio)
        assert rows["optimiser"][kind]["eager_bytes"] == 7 * 4 * sum(one.numel() for one in model.parameters())


def test_a_linear_layer_moves_its_input_weight_and_output():
    (forward,) = operators_of(lambda *tensors: F.linear(*tensors), (5, 7), (3, 7), (3,))
    assert (forward.kind, forward.flops) == ("linear layers", 2 * 5 * 7 * 3)
    assert forward.bytes == forward.fused_bytes == 4 * (5 * 7 + 3 * 7 + 3 + 5 * 3)
    *_, output, weight, bias = operators_of(lambda *tensors: F.linear(*tensors).sum().backward(), (5, 7), (3, 7), (3,))
    # The gradient of a sum is one number, expanded.
    assert (output.name, output.bytes) == ("mm", 4 * (1 + 3 * 7 + 5 * 7))
    assert (weight.name, weight.bytes) == ("mm", 4 * (1 + 5 * 7 + 3 * 7)) and (bias.name, bias.bytes) == ("sum", 16)


def test_a_fused_chain_reads_what_comes_in_once_and_writes_what_goes_out():
    def chain(first, second, weight):
        middle = (first + second).tanh() * first
        return (middle @ weight).relu()

    add, tanh, mul, product, relu = operators_of(chain, (4, 6), (4, 6), (6, 2))
    entry, output = 4 * 4 * 6, 4 * 4 * 2
    assert [one.bytes for one in (add, tanh, mul)] == [3 * entry, 2 * entry, 3 * entry]
    assert [one.fused_bytes for one in (add, tanh, mul)] == [2 * entry, 0, entry]
    assert relu.fused_bytes == relu.bytes == 2 * output
    assert product.fused_bytes == product.bytes == entry + 4 * 6 * 2 + output


def test_views_and_empty_tensors_move_nothing():
    assert operators_of(lambda one: torch.empty_like(one.transpose(0, 1)[1:].unsqueeze(0)), (4, 6)) == []


def test_fusing_and_routing_save_bytes_and_time(report):
    for row in [*report["rows"], report["steps"]]:
        for kind in ("dense", "routed"):
            assert row[kind]["fused_bytes"] <= row[kind]["eager_bytes"]
            assert row[kind]["fused_seconds"] <= row[kind]["eager_seconds"]
    dense, routed = report["steps"]["dense"], report["steps"]["routed"]
    assert dense["fused_bytes"] < dense["eager_bytes"]
    for name in dense:
        assert report["same_in_both"][name] < routed[name] < dense[name]
    assert {row["class"] for row in report["rows"] if row["dense"]["eager_bytes"]} == set(roofline.CLASSES)


def test_a_rate_that_doubles_halves_what_it_bounds():
    (operator,) = operators_of(lambda *tensors: tensors[0] @ tensors[1], (512, 512), (512, 512))
    slow = roofline.parse_args(["--matmul_tflops", "0.001"])
    assert roofline.seconds(operator, slow, fused=True) == 2 * 512**3 / 1e9
    fast = roofline.parse_args(["--matmul_tflops", "1e9", "--bandwidth_tbs", "0.001"])
    assert roofline.seconds(operator, fast, fused=True) == 3 * 4 * 512**2 / 1e9


def test_what_was_measured_stands_beside(report, measured):
    assert report["measured"]["steps"] == dict.fromkeys(("eager", "fused"), {"dense": 0.3, "routed": 0.2})
    assert report["measured"]["classes"]["elementwise and norms"] == pytest.approx({"dense": 0.023, "routed": 0.0115})
    lines = roofline.table(report).splitlines()
    assert "| 300.0 |" in lines[-1] and lines[-1].count("|") == lines[-3].count("|")
    cells = {line.split("|")[1].strip(): line.split("|")[7].strip() for line in lines[2:9]}
    assert cells["elementwise and norms"] == "23.0" and cells["attention"] == "-" and cells["the rest"] == "50.0"
    with pytest.raises(ValueError, match="Expected rows of .*'B/2'.* in .*profile.json"):
        roofline.main(["--preset", "B/2", "--tokens", "16", "--measured", measured.split(",")[1]])
