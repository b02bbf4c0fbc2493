# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and reports what it measured; how fast a machine is, no test can claim."""

import json

import pytest
import routing_overhead
import torch

from diffusers_tread import TREADTransformer2DModel


@pytest.fixture
def model():
    return TREADTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=7, sample_size=8).train()


def test_the_shares_are_those_of_the_times(tmp_path, model, monkeypatch):
    monkeypatch.setattr(TREADTransformer2DModel, "from_preset", lambda preset: model)
    path = tmp_path / "routing.json"
    routing_overhead.main(["--shapes", "2x16", "--repeats", "3", "--output", str(path)])
    (row,) = json.loads(path.read_text())["rows"]

    median = {name.removesuffix("_microseconds"): row[name]["median"] for name in row if isinstance(row[name], dict)}
    routing = sum(median[part] for part in ("plan", "take", "take_backward", "put", "put_backward"))
    route = model.token_router.routes[0]
    inside = route.end - route.start + 1
    step = routing + (7 - inside) * median["block"] + inside * median["routed_block"]
    assert row["routing_microseconds"] == pytest.approx(routing)
    assert row["share_of_block"] == pytest.approx(routing / median["block"])
    assert row["share_of_routed_step"] == pytest.approx(routing / step)
    assert (row["batch_size"], row["num_tokens"], row["width"]) == (2, 16, 16)


def test_what_is_timed_is_what_a_routed_step_does(model):
    args = routing_overhead.parse_args(["--selection_ratio", "0.75"])
    steps = routing_overhead.make_steps(model, 2, 16, args)
    (ids,) = steps["plan"]()
    assert ids.shape == (2, 4) and steps["take"]().shape == (2, 4, 16) and steps["put"]().shape == (2, 16, 16)

    # Each gradient is that of an indexing with the same ids.
    (take_gradient,) = steps["take_backward"]()
    put_gradient, kept_gradient = steps["put_backward"]()
    rows = torch.arange(2).unsqueeze(1)
    assert take_gradient[rows, ids].ne(0).all() and take_gradient.ne(0).sum() == 2 * 4 * 16
    assert put_gradient[rows, ids].eq(0).all() and put_gradient.eq(0).sum() == 2 * 4 * 16
    assert kept_gradient.shape == (2, 4, 16)

    lengths = []
    model.transformer_blocks[0].register_forward_hook(lambda block, inputs, output: lengths.append(output.shape[1]))
    steps["block"]()
    steps["routed_block"]()
    assert lengths == [16, 4]


def test_the_table_has_a_row_per_shape():
    times = {f"{name}_microseconds": {"median": 1000.0} for name in (*routing_overhead.PARTS, "block")}
    row = {"batch_size": 8, "num_tokens": 256, "width": 768, "share_of_block": 0.01, "share_of_routed_step": 0.001}
    header, line, first = routing_overhead.table({"rows": [row | times]}).splitlines()
    assert header.count("|") == line.count("|") == first.count("|") == 10
    assert first.startswith("| 8 × 256 × 768 | 1,000 |") and first.endswith("| 1.00% | 0.100% |")
