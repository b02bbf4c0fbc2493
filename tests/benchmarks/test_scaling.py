# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The model of the step on many GPUs against closed forms, and docs/scaling.md against what the script predicts."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import report
import scaling
from scaling_model import (
    KINDS,
    SCHEMES,
    Cluster,
    Model,
    Plan,
    all_reduce,
    exposed,
    gain_kept,
    smallest_batch,
    speedup,
    step,
    traffic,
)


ROOT = Path(__file__).parents[2]
MODEL = Model(num_parameters=10**9, num_blocks=9, seconds_per_image={"dense": 2e-3, "routed": 1e-3}, overhead=5e-3)
# Nothing but compute and communication.
BARE = {"memory_bandwidth": float("inf"), "checkpoint_rate": float("inf"), "storage_rate": float("inf")}
FLAT = Cluster(gpus_per_node=1, inter_bandwidth=1e9, latency=0.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_gpu_sends_nothing(scheme):
    sent = traffic(1, MODEL, Plan(scheme=scheme), Cluster())
    assert (sent.forward, sent.backward, sent.reduction) == (0, 0, 0)
    assert step("dense", 1, 10, MODEL, Plan(scheme=scheme, **BARE), Cluster()).total == pytest.approx(25e-3)


def test_an_all_reduce_takes_the_ring_s_time_and_tends_to_twice_the_bytes():
    assert all_reduce(6e9, 3, FLAT) == pytest.approx(2 * 2 / 3 * 6)
    assert all_reduce(6e9, 10**6, FLAT) == pytest.approx(2 * 6, rel=1e-5)


def test_an_all_reduce_across_nodes_is_three_stages_of_which_the_middle_one_has_shards():
    cluster = Cluster(gpus_per_node=4, intra_bandwidth=10e9, inter_bandwidth=1e9, latency=1e-3)
    in_node, across = 3 / 4 * 8 / 10 + 2e-3, 2 * (2 / 3 * 2 / 1 + 2e-3)  # 4 GPUs: 2 levels; 3 nodes: 2 levels
    assert all_reduce(8e9, 12, cluster) == pytest.approx(in_node + across + in_node)


def test_full_sharding_sends_one_and_a_half_times_as_much_as_ddp_and_its_hybrid_less_across_nodes():
    cluster = Cluster(intra_bandwidth=float("inf"), inter_bandwidth=1e9, latency=0.0)
    sent = {}
    for scheme in SCHEMES:
        plan = Plan(scheme=scheme, ddp_gradient_bytes=4, fsdp_gradient_bytes=4, fsdp_parameter_bytes=4)
        parts = traffic(64, MODEL, plan, cluster)
        sent[scheme] = parts.forward + parts.backward + parts.reduction
    assert sent["fsdp2"] == pytest.approx(1.5 * sent["ddp"]) and sent["hsdp"] == pytest.approx(sent["ddp"])
    kept = traffic(64, MODEL, Plan(scheme="fsdp2", reshard_after_forward=False), cluster)
    assert kept.backward == 0 and kept.forward == kept.reduction > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_infinite_links_the_speed_up_is_that_of_the_compute(scheme):
    cluster = Cluster(intra_bandwidth=float("inf"), inter_bandwidth=float("inf"), latency=0.0)
    plan = Plan(scheme=scheme, **BARE)
    assert speedup(1024, 10, MODEL, plan, cluster) == pytest.approx(25 / 15)
    assert gain_kept(1024, 10, 10, MODEL, plan, cluster) == pytest.approx(1)


def test_what_the_window_does_not_hide_is_exposed_and_never_less_than_a_piece():
    assert exposed(10.0, 5, window=4.0, overlap=1.0) == 6 and exposed(10.0, 5, window=4.0, overlap=0.5) == 8
    assert exposed(10.0, 5, window=100.0, overlap=1.0) == 2 and exposed(10.0, 5, window=100.0, overlap=0.0) == 10


def test_a_ddp_step_is_compute_and_what_its_backward_does_not_hide():
    parts = step("routed", 2, 60, MODEL, Plan(bucket_bytes=4e8, **BARE), FLAT)
    assert parts.exposed == pytest.approx(4 - 60e-3 * 2 / 3) and parts.compute == pytest.approx(65e-3)
    halves = step("routed", 2, 60, MODEL, Plan(bucket_bytes=4e8, accumulation=2, **BARE), FLAT)
    assert halves.exposed == pytest.approx(4 - 60e-3 / 3) and halves.compute == pytest.approx(70e-3)


def test_update_checkpoint_and_data_take_what_their_bytes_take():
    plan = Plan(
        memory_bandwidth=1e12, checkpoint_rate=1e9, checkpointing_steps=1000, image_bytes=1e6, storage_rate=1e9
    )
    parts = step("routed", 1, 100, MODEL, plan, Cluster())
    assert (parts.update, parts.checkpoint) == pytest.approx((40e-3, 16e-3))
    assert parts.data == 0 and step("routed", 8, 100, MODEL, plan, Cluster()).data > 0.6  # 800 MB in a node
    sharded = step("routed", 8, 100, MODEL, replace(plan, scheme="fsdp2"), Cluster())
    assert sharded.update == pytest.approx(5e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_bandwidth_and_larger_batches_keep_more_and_no_gpu_count_makes_the_step_faster(scheme):
    plan, slow = Plan(scheme=scheme, **BARE), Cluster(inter_bandwidth=5e9)
    for kind in KINDS:
        times = [step(kind, 2**power, 32, MODEL, plan, slow).total for power in range(3, 11)]
        assert times == sorted(times) and times[-1] > step(kind, 1024, 32, MODEL, plan, Cluster()).total
    kept = [gain_kept(64, batch, batch, MODEL, plan, slow) for batch in (16, 256, 1024)]
    assert kept == sorted(kept) and kept[0] < kept[-1] <= 1 + 1e-9
    batch = smallest_batch(64, 0.9, None, MODEL, plan, slow)
    assert (
        gain_kept(64, batch, batch, MODEL, plan, slow) >= 0.9 > gain_kept(64, batch - 1, batch - 1, MODEL, plan, slow)
    )
    assert smallest_batch(64, 0.9, None, MODEL, plan, slow, limit=batch - 1) is None


def test_a_node_that_is_not_full_is_refused():
    with pytest.raises(ValueError, match="whole nodes of 8"):
        step("dense", 12, 1, MODEL, Plan(), Cluster())


def test_the_line_through_the_measured_batches_gives_the_smaller_one_as_well():
    args = scaling.parse_args([])
    model = scaling.make_model("XL/2", args)
    rows = json.loads((scaling.RESULTS / "train_step_gpu.json").read_text(encoding="utf-8"))["rows"]
    (row,) = [row for row in rows if row["mode"] == "blocks"]
    for kind in KINDS:
        parts = step(kind, 1, row["batch_size"], model, Plan(ema=False), Cluster())
        assert parts.compute + parts.update == pytest.approx(row[f"{kind}_seconds"]["median"], rel=0.02)


@pytest.mark.parametrize("name", ["scaling_weak", "scaling_strong"])
def test_the_committed_predictions_are_what_the_script_predicts(name, capsys):
    committed = json.loads((scaling.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    flags = shlex.split(committed["command"])[2:]
    flags = flags[: flags.index("--output")]
    rows = scaling.main(flags)["rows"]
    assert scaling.table({"settings": committed["settings"], "rows": rows}) == scaling.table(committed)


def test_the_guide_is_what_the_committed_results_make_it():
    assert report.main(["--check", "--document", str(ROOT / "docs" / "scaling.md")]) == 0


def test_the_check_compares_what_two_processes_took_with_the_model():
    args = scaling.parse_args(["--check", "--check_preset", "S/8", "--tokens", "16"])
    with scaling.torch.device("meta"):
        model = scaling.scaling_check.make_model(args)
    medians = {"ddp_collectives": 0.2, "update": 0.1, "ddp_dense": 2.2, "ddp_routed": 1.3}
    medians |= {"alone_dense": 1.8, "alone_routed": 0.9, "apart_dense": 1.9, "apart_routed": 1.0}
    times = {name: [value, value] for name, value in medians.items()}
    row = scaling.scaling_check.compare("ddp", model, medians, times, args)
    pieces = -(-4 * sum(weight.numel() for weight in model.parameters()) // (25 * 2**20))
    assert row["dense_predicted_seconds"] == pytest.approx([2.2, 2.0 + 0.2 / pieces])
    assert row["dense_deviation"][0] == pytest.approx(0, abs=1e-9) and row["speedup_alone"] == pytest.approx(1.9)
