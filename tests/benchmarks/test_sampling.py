# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and reports what it measured; how fast a machine is, no test can claim."""

import json

import pytest
import sampling as script
import torch

from diffusers_tread import TREADTransformer2DModel
from diffusers_tread.flops import forward_flops
from diffusers_tread.guiders import branches_of


TINY = ["--preset", "S/8", "--tokens", "16", "--repeats", "3"]


@pytest.fixture(scope="module")
def report(tmp_path_factory, small_s):
    path = tmp_path_factory.mktemp("sampling") / "results" / "sampling.json"
    returned = script.main([*TINY, "--batch_size", "2", "--num_inference_steps", "2", "--output", str(path)])
    written = json.loads(path.read_text())
    assert written["rows"] == returned["rows"] and script.table(written) == script.table(returned)
    return written


def test_the_report_holds_what_another_person_needs_to_repeat_it(report):
    assert report["command"].startswith("python benchmarks/sampling.py --preset S/8 --tokens 16")
    assert report["settings"]["preset"] == "S/8" and report["settings"]["dtype"] == "float32"
    samplers = [(row["sampler"], row["predictions"]) for row in report["rows"]]
    assert samplers == [("flow Euler", 2)] * 5 + [("EDM Heun", 3)] * 3


def test_the_ratios_are_those_of_the_seconds(report):
    for rows in (report["rows"][:5], report["rows"][5:]):
        cfg = next(row for row in rows if row["guidance"] == "CFG")
        for row in rows:
            seconds = row["seconds_per_image"]["median"]
            assert row["images_per_second"] == pytest.approx(1 / seconds)
            assert row["speedup_over_cfg"] == pytest.approx(cfg["seconds_per_image"]["median"] / seconds)
            assert row["speedup_over_flops"] == pytest.approx(row["speedup_over_cfg"] / row["flops_speedup"])
            assert row["speedup_of_turns"]["min"] <= row["speedup_of_turns"]["max"]
        assert cfg["speedup_over_cfg"] == cfg["flops_speedup"] == 1.0


def test_the_flops_are_those_of_the_branches(report):
    with torch.device("meta"):
        model = TREADTransformer2DModel.from_preset("S/8", sample_size=32)
    dense, half, tenth = (forward_flops(model, selection_ratio=ratio).total for ratio in (0.0, 0.5, 0.9))
    found = {row["guidance"]: (row["flops_speedup"], row["flops_speedup_apart"]) for row in report["rows"]}
    apart = 2 * dense / (half + tenth)
    assert found["none"] == pytest.approx((2.0, 2.0))
    assert found["SG 0.5/0.9, apart"] == pytest.approx((apart, apart))
    assert found["SG 0.5/0.9"][1] == pytest.approx(apart) and found["SG 0.5/0.9"][0] > apart + 0.1


def test_only_the_guider_that_says_so_shares():
    shares = {kind: any(branch.shares_prefix for branch in branches_of(make())) for kind, make in script.KINDS.items()}
    assert [kind for kind, does in shares.items() if does] == ["SG 0/0.7", "SG 0.5/0.9"]


def test_the_table_has_a_line_per_row(report):
    lines = script.table(report).splitlines()
    assert len(lines) == 2 + 8 and len({line.count("|") for line in lines}) == 1
    assert "1.00× | 1.00× | 100%" in lines[3]


def test_other_precisions_and_compilation_run(small_s, monkeypatch):
    torch._dynamo.reset()
    compiled, compile_blocks = [], TREADTransformer2DModel.compile_repeated_blocks

    def quick(self, **settings):
        compiled.append(settings)
        compile_blocks(self, backend="eager", **settings)

    monkeypatch.setattr(TREADTransformer2DModel, "compile_repeated_blocks", quick)
    scheduler_class, _ = script.SAMPLERS["flow Euler"]
    monkeypatch.setattr(script, "SAMPLERS", {"flow Euler": (scheduler_class, ("CFG", "SG 0.5/0.9"))})
    report = script.main([*TINY, "--dtype", "bfloat16", "--compile", "--warmup", "1"])
    assert compiled == [{"fullgraph": True, "dynamic": False}] and len(report["rows"]) == 2
