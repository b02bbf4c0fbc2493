# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/report.py: docs/performance.md is what the committed results make it."""

import json
from pathlib import Path

import pytest
import report
from PIL import Image


ROOT = Path(__file__).parents[2]


def summary(value):
    return {"median": value, "first_quartile": value * 0.9, "third_quartile": value * 1.1}


def step_report(**settings):
    """What a run of train_step.py writes, with a quotient of 0.98 and a peer that is 0.97 as slow."""
    row = {
        "preset": "B/2", "num_tokens": 256, "batch_size": 8, "mode": "eager",
        "dense_seconds": summary(6.0), "routed_seconds": summary(4.0), "speedup": 1.5,
        "speedup_of_pairs": summary(1.5), "flop_ceiling": 1.53, "speedup_over_ceiling": 0.98,
        "peer_seconds": summary(6.2), "dense_over_peer": 0.97, "peer_problem": None,
        "dense_peak_bytes": None, "routed_peak_bytes": None, "dense_flops_per_step": 3e12,
        "dense_images_per_second": 8 / 6, "routed_images_per_second": 2.0,
        "dense_share_of_matmul_rate": 0.8, "routed_share_of_matmul_rate": 0.7,
    }  # fmt: skip
    smaller = row | {"preset": "S/2", "dense_flops_per_step": 1e12, "dense_over_peer": 0.5}
    return {
        "command": "python benchmarks/train_step.py --output 'a b.json'",
        "started": "2026-01-02T03:04:05+00:00",
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "hardware": {"cpu": "a CPU", "cpu_cores": 2, "accelerator": None},
        "versions": {"python": "3.11.0", "torch": "2.6.0", "diffusers_tread": "0.1.0"},
        "settings": {"dtype": "float32", "matmul_precision": "highest"},
        "rows": [smaller, row],
        **settings,
    }


@pytest.fixture
def folder(tmp_path):
    """A document with a block of each kind, and the results of one script."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "train_step_cpu.json").write_text(json.dumps(step_report()))
    blocks = ["goals", "results/train_step_cpu.json", "results/train_step_gpu.json", "results/memory_cpu.json"]
    text = "# Title\n" + "".join(f"\n<!-- {name} -->\nold\n<!-- end -->\n" for name in blocks) + "\nlast words\n"
    (tmp_path / "guide.md").write_text(text)
    return tmp_path


def run(folder, *flags):
    paths = ["--document", folder / "guide.md", "--results", folder / "results", "--plot", folder / "plot.png"]
    return report.main([*map(str, paths), *flags])


@pytest.mark.parametrize("guide", ["performance", "backbones"])
def test_the_guide_is_what_the_committed_results_make_it(guide):
    for name in ("accelerate", "datasets", "lmdb"):  # of the scripts whose tables it makes
        pytest.importorskip(name)
    assert report.main(["--check", "--document", str(report.ROOT / "docs" / f"{guide}.md")]) == 0


def test_blocks_are_rewritten_and_the_rest_stays(folder):
    before = (folder / "guide.md").read_text()
    assert run(folder, "--check") == 1 and (folder / "guide.md").read_text() == before
    assert run(folder) == 0
    text = (folder / "guide.md").read_text()
    assert text.startswith("# Title\n\n<!-- goals -->\n| what |") and text.endswith("<!-- end -->\n\nlast words\n")
    assert "old" not in text and text.count("<!-- end -->") == before.count("<!-- end -->") == 4
    assert "| B/2 | 256 x 8 | eager, float32 | 6,000 | 4,000 | 1.50 | 98% of 1.53 |" in text
    assert "results/train_step_gpu.json -->\nNot measured yet: `make bench-gpu`.\n" in text
    assert "results/memory_cpu.json -->\nNot measured yet: `make bench`.\n" in text
    assert Image.open(folder / "plot.png").format == "PNG"
    assert run(folder, "--check") == 0 and run(folder) == 0 and (folder / "guide.md").read_text() == text


def test_the_line_under_a_table_says_where_it_comes_from():
    assert report.source(step_report()) == (
        "`python benchmarks/train_step.py --output 'a b.json'`: commit 0123456, 2026-01-02, a CPU, 2 cores, "
        "python 3.11.0, torch 2.6.0."
    )
    hardware = {"cpu": "a CPU", "cpu_cores": 2, "accelerator": "a GPU"}
    changed = step_report(source={"commit": "fedcba9876", "dirty": True}, hardware=hardware)
    assert "commit fedcba9 with uncommitted changes, 2026-01-02, a GPU," in report.source(changed)
    assert "no commit" in report.source(step_report(source={"commit": None, "dirty": None}))


def test_the_goals_say_what_was_met_missed_and_not_measured(folder):
    speedups = [("SG 0.5/0.9", 2.31), ("SG 0.5/0.9", 2.26), ("SG 0/0.7", 1.3)]
    results = {
        "sampling_cpu": [{"guidance": kind, "speedup_over_cfg": speedup} for kind, speedup in speedups],
        "startup_cpu": [{"what": "import beyond the peer", "seconds": summary(0.02)}],
        "training_loop_cpu": [{"overhead_with_checkpoints": 0.041}],
        "train_step_batch_256_gpu": [{"routed_seconds": summary(0.25)}],
    }
    for name, rows in results.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(step_report(rows=rows)))
    cells = [line.strip("| ").split(" | ")[1:] for line in report.goals_table(folder / "results").splitlines()[2:]]
    assert cells == [
        ["≥ 0.97", "0.98, met", "≥ 0.97", "not measured"],
        ["≤ 0.95", "0.97, missed", "≤ 0.80", "not measured"],
        ["-", "-", "≥ 3.70", "4.00, met"],
        ["≥ 2.25", "2.26, met", "≥ 2.20", "not measured"],
        ["≤ 3.0%", "4.1%, missed", "≤ 2.0%", "not measured"],
        ["≤ 0.15", "0.02, met", "-", "-"],
    ]


def test_of_a_size_the_compiled_row_counts():
    eager = step_report()["rows"][1]
    rows = [eager, eager | {"mode": "compiled"}, eager | {"mode": "blocks"}]
    rows += [eager | {"num_tokens": 1024, "dense_flops_per_step": 1e15}]
    assert report.step_row({"rows": rows})["mode"] == "compiled"


@pytest.mark.parametrize(
    "text", ["<!-- goals -->\n", "<!-- end -->\n", "<!-- goals -->\n<!-- results/a.json -->\n<!-- end -->\n"]
)
def test_a_block_without_its_end_is_refused(folder, text):
    (folder / "guide.md").write_text(text)
    with pytest.raises(ValueError, match="Expected blocks from"):
        run(folder)
