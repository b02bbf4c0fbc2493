# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/hooks_overhead.py, on models too small to measure anything."""

import json

import hooks_overhead
import pytest

from diffusers_tread.hooks.specs import BLOCK_SPECS


TINY = ["--tokens", "16", "--width", "64", "--batch_size", "1", "--repeats", "2", "--warmup", "0"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("hooks") / "new" / "report.json"
    report = hooks_overhead.main([*TINY, "--output", str(path)])
    del BLOCK_SPECS["EmptyBlock"]  # which the script registers
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    return report


def test_it_tells_the_models_and_the_states_of_the_hooks(report):
    assert [row["model"] for row in report["rows"]] == ["Flux", "SD3"]
    assert set(report["overhead_microseconds_per_block"]) == {"off", "on, one subset", "on, subset per sample"}


def test_the_flop_ceiling_is_that_of_a_count_by_hand(report):
    """SD3 with d = 64, 16 image tokens of which 8 are routed away in 7 of 12 blocks, and 64 text tokens."""
    row = report["rows"][1]

    def block(image, text, last=False):
        stream = 24 * 64**2  # q, k, v, out and the feed-forward of four times the width, two FLOPs per weight
        text_cost = text * (6 * 64**2 if last else stream)  # the last one computes only its keys, values, queries
        return image * stream + text_cost + 4 * 64 * (image + text) ** 2

    dense = 11 * block(16, 64) + block(16, 64, last=True)
    routed = dense - 7 * (block(16, 64) - block(8, 64))
    assert row["flop_ceiling"] == pytest.approx(dense / routed, rel=0.02)
