# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/hooks_overhead.py, on models too small to measure anything."""

import json

import hooks_overhead
import pytest

from diffusers_tread.hooks.specs import BLOCK_SPECS


TINY = ["--tokens", "16", "--width", "64", "--batch_size", "1", "--repeats", "2", "--warmup", "0"]


@pytest.fixture(autouse=True)
def the_empty_block_is_forgotten():
    yield
    BLOCK_SPECS.pop("EmptyBlock", None)


def test_it_writes_what_it_measured(tmp_path):
    report = hooks_overhead.main([*TINY, "--output", str(tmp_path / "new" / "report.json")])
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [row["model"] for row in report["rows"]] == ["Flux", "SD3"]
    assert set(report["overhead_microseconds_per_block"]) == {"off", "on, one subset", "on, subset per sample"}


def test_the_flop_ceiling_is_that_of_a_count_by_hand():
    """SD3 with d = 64, 16 image tokens of which 8 are routed away in 7 of 12 blocks, and 64 text tokens."""
    row = hooks_overhead.main(TINY)["rows"][1]

    def block(image, text, last=False):
        stream = 24 * 64**2  # q, k, v, out and the feed-forward of four times the width, two FLOPs per weight
        text_cost = text * (6 * 64**2 if last else stream)  # the last one computes only its keys, values, queries
        return image * stream + text_cost + 4 * 64 * (image + text) ** 2

    dense = 11 * block(16, 64) + block(16, 64, last=True)
    routed = dense - 7 * (block(16, 64) - block(8, 64))
    assert row["flop_ceiling"] == pytest.approx(dense / routed, rel=0.02)
