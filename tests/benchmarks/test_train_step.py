# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and reports what it measured; how fast a machine is, no test can claim."""

import json
import statistics

import pytest
import torch
import train_step
from diffusers import DiTTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusers_tread


pytestmark = pytest.mark.usefixtures("small_s")
TINY = ["--presets", "S/8", "--tokens", "4", "--batch_size", "2", "--repeats", "3", "--warmup", "1"]


@pytest.fixture(autouse=True)
def the_precision_of_products_stays():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_s):
    """The report of a tiny run and the file it wrote."""
    path = tmp_path_factory.mktemp("step") / "results" / "step.json"
    return train_step.main([*TINY, "--output", str(path)]), path


def test_the_report_holds_what_another_person_needs_to_repeat_it(run):
    report, path = run
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert report["command"].startswith("python benchmarks/train_step.py --presets S/8 --tokens 4")
    assert report["hardware"]["cpu"] and report["hardware"]["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["diffusers_tread"] == diffusers_tread.__version__
    assert set(report["source"]) == {"commit", "dirty"}
    assert report["settings"]["seed"] == 0 and report["settings"]["matmul_precision"] == "highest"
    assert sorted(file.name for file in path.parent.iterdir()) == ["step.json"]


def test_the_ratios_and_rates_follow_from_the_seconds_and_the_flops(run):
    report, _ = run
    (row,) = report["rows"]
    dense, routed, peer = (row[f"{kind}_seconds"]["median"] for kind in ("dense", "routed", "peer"))
    assert row["speedup"] == dense / routed
    assert row["speedup_over_ceiling"] == row["speedup"] / row["flop_ceiling"]
    assert row["dense_over_peer"] == dense / peer
    assert row["flop_ceiling"] == pytest.approx(row["dense_flops_per_step"] / row["routed_flops_per_step"], rel=5e-3)
    assert row["routed_images_per_second"] == 2 / routed
    assert row["dense_tflops"] == row["dense_flops_per_step"] / dense / 1e12
    assert row["dense_share_of_matmul_rate"] == row["dense_tflops"] / report["peak"]["matmul_tflops"]
    assert "dense_mfu" not in row and report["peak"]["vendor_tflops"] is None  # no data sheet of this CPU
    assert row["dense_peak_bytes"] is None


@pytest.mark.parametrize("kind", ["dense", "routed"])
def test_the_flops_of_a_step_are_those_that_torch_counts(kind, run):
    args = train_step.parse_args(TINY)
    _, steps = train_step.make_steps("S/8", 4, 2, "eager", args)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        steps[kind]()
    assert run[0]["rows"][0][f"{kind}_flops_per_step"] == counter.get_total_flops()


def test_a_known_accelerator_is_measured_by_its_data_sheet_in_bfloat16_only(monkeypatch):
    args = train_step.parse_args([*TINY, "--dtype", "bfloat16"])
    monkeypatch.setattr(train_step.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(train_step, "time_in_turns", lambda steps, args, repeats: {"product": [1.0, 2.0]})
    monkeypatch.setattr(train_step.torch, "randn", lambda *sizes, **options: (None, None))
    args.device = "cuda"
    expected = {"matmul_tflops": 2 * 16384**3 / 1e12, "vendor_tflops": 989.0}
    assert train_step.measure_peak(args) == expected
    args.dtype = "float32"
    assert train_step.measure_peak(args) == expected | {"vendor_tflops": None}


def test_a_step_trains_the_model_and_routes_only_when_asked_to():
    args = train_step.parse_args(["--presets", "S/2", "--batch_size", "1", "--selection_ratio", "0.75"])
    model, steps = train_step.make_steps("S/2", 16, 1, "eager", args)
    lengths = []
    model.transformer_blocks[4].register_forward_hook(lambda block, inputs, output: lengths.append(output.shape[1]))
    before = model.proj_out.weight.detach().clone()
    steps["dense"]()
    steps["routed"]()
    assert lengths == [16, 4]
    assert model.training and not torch.equal(model.proj_out.weight, before)


def test_the_peer_is_diffusers_transformer_of_the_same_size(monkeypatch):
    args, peers = train_step.parse_args(TINY), []
    make_step = train_step.make_step
    monkeypatch.setattr(train_step, "make_step", lambda model, *rest: peers.append(model) or make_step(model, *rest))
    model, _ = train_step.make_steps("S/8", 16, 2, "eager", args)
    _, problem = train_step.make_peer_step(model, 2, "eager", args)
    peer = peers[1]
    assert problem is None and type(peer) is DiTTransformer2DModel and peer.training

    # The blocks are as large; only diffusers embeds time and class in each block again.
    def size(blocks):
        return sum(value.numel() for name, value in blocks.named_parameters() if "embedder" not in name)

    assert size(peer.transformer_blocks) == size(model.transformer_blocks)
    latents = torch.zeros(2, 4, 32, 32)
    assert peer(latents, torch.zeros(2), torch.zeros(2, dtype=torch.int64)).sample.shape == latents.shape


def test_where_the_peer_cannot_be_compiled_the_row_says_why(monkeypatch):
    args = train_step.parse_args(TINY)
    model, _ = train_step.make_steps("S/8", 4, 2, "eager", args)

    def fail(self, **settings):
        raise ValueError("no graph\nof this")

    monkeypatch.setattr(train_step.DiTTransformer2DModel, "compile_repeated_blocks", fail)
    step, problem = train_step.make_peer_step(model, 2, "blocks", args)
    assert step is None and problem == "ValueError: no graph"


@pytest.mark.parametrize("mode", ["compiled", "blocks"])
def test_compiled_steps_run_one_graph_for_each_number_of_tokens(mode, monkeypatch):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **options, backend=backend))
    torch.compiler.reset()
    args = train_step.parse_args(TINY)
    _, steps = train_step.make_steps("S/8", 4, 2, mode, args)
    for step in [*steps.values(), *steps.values()]:
        step()
    assert len(graphs) == 2


def test_checkpointed_blocks_run_again_in_the_backward():
    args = train_step.parse_args([*TINY, "--gradient_checkpointing"])
    model, steps = train_step.make_steps("S/8", 4, 2, "eager", args)
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda block, inputs: calls.append(1))
    steps["dense"]()
    assert len(calls) == 2


def test_the_table_shows_every_row(run):
    rows = run[0]["rows"] + [run[0]["rows"][0] | {"preset": "B/2", "peer_seconds": None, "dense_over_peer": None}]
    header, _, *lines = train_step.table(run[0] | {"rows": rows}).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| S/8", "| B/2"]
    assert "share of the matmul rate" in header and "GiB" not in header and lines[1].endswith("| - | - |")
    assert {line.count("|") for line in [header, *lines]} == {header.count("|")}

    medium = run[0]["settings"] | {"dtype": "bfloat16", "matmul_precision": "medium"}
    assert "| eager, float32 |" in lines[0]
    assert "| eager, bfloat16, medium precision of products |" in train_step.table(run[0] | {"settings": medium})

    on_a_gpu = {"dense_mfu": 0.5, "routed_mfu": 0.4, "dense_peak_bytes": 2**32, "routed_peak_bytes": 2**31}
    header, _, line = train_step.table(run[0] | {"rows": [rows[0] | on_a_gpu]}).splitlines()
    assert "MFU" in header and "50%, 40%" in line and line.endswith("| 4.0, 2.0 |")


def test_the_quartiles_are_those_of_the_values():
    values = [float(value) for value in range(1, 10)]
    summary = train_step.summary(values)
    assert (summary["first_quartile"], summary["median"], summary["third_quartile"]) == (3.0, 5.0, 7.0)
    assert (summary["min"], summary["max"]) == (1.0, 9.0)
    assert summary["median"] == statistics.median(values)


def test_each_number_of_tokens_has_its_batch_size():
    report = train_step.main([*TINY, "--tokens", "4,16", "--batch_size", "2,1", "--no-peer", "--repeats", "2"])
    assert [(row["num_tokens"], row["batch_size"]) for row in report["rows"]] == [(4, 2), (16, 1)]
    assert {row["peer_problem"] for row in report["rows"]} == {"not asked for"}
