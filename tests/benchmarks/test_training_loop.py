# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script runs the real loop beside the bare step and reports what it measured."""

import json

import pytest
import torch


pytest.importorskip("datasets")
import training_loop as script  # noqa: E402


TINY = ["--preset", "S/8", "--tokens", "4", "--batch_size", "1", "--repeats", "2", "--warmup", "1"]


@pytest.fixture(autouse=True)
def restored(fresh_accelerate, small_s):
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_report_tells_the_loop_and_the_bare_step_apart(tmp_path, monkeypatch):
    trainers, make_row = [], script.make_row
    monkeypatch.setattr(script, "make_row", lambda trainer, args: trainers.append(trainer) or make_row(trainer, args))
    path = tmp_path / "loop.json"
    flags = [*TINY, "--steps_per_turn", "2", "--checkpointing_steps", "50", "--dtype", "bfloat16"]
    script.main([*flags, "--folder", str(tmp_path), "--output", str(path)])
    report, (trainer,) = json.loads(path.read_text()), trainers
    (row,) = report["rows"]

    # Two steps of each kind per turn, the first turn not counted.
    assert trainer.step == 6 and trainer.accelerator.mixed_precision == "bf16"
    assert trainer.optimizer.optimizer.state[trainer.parameters[0]]["step"] == 6 + 6
    assert {part: len(calls) for part, calls in trainer.parts.items()} == {
        "data": 6, "clipping": 6, "average": 6, "schedule": 6, "log": 3
    }  # fmt: skip
    assert row["loop_seconds"]["max"] == max(trainer.turns["loop"][1:]) / 2
    assert row["average_seconds"] == pytest.approx(sum(trainer.parts["average"][2:]) / 4)
    assert row["log_seconds"] == pytest.approx(sum(trainer.parts["log"][1:]) / 4)

    # Shares of the bare step.
    bare = row["bare_seconds"]["median"]
    assert row["overhead"] == pytest.approx(row["loop_seconds"]["median"] / bare - 1)
    shares = [row[f"{part}_share"] for part in script.PARTS]
    assert row["clipping_share"] == row["clipping_seconds"] / bare
    assert sum(shares) + row["other_share"] == pytest.approx(row["overhead"])
    assert row["checkpoint_share"] == row["checkpoint_seconds"] / 50 / bare
    assert row["overhead_with_checkpoints"] == row["overhead"] + row["checkpoint_share"]

    # Weights, average and two moments in float32.
    assert 1.0 < row["checkpoint_bytes"] / (16 * trainer.settings["num_parameters"]) < 1.01
    assert [child.name for child in tmp_path.iterdir()] == ["loop.json"]


def test_the_table_holds_the_medians():
    row = {
        "preset": "B/2", "num_tokens": 256, "batch_size": 8, "checkpoint_seconds": 5.5, "checkpoint_bytes": 2.1e9,
        "loop_seconds": {"median": 4.2}, "bare_seconds": {"median": 4.0}, "other_share": 0.002,
        "checkpoint_share": 0.0001, "overhead_with_checkpoints": 0.0501,
        **{f"{part}_share": 0.001 * number for number, part in enumerate(script.PARTS)},
    }  # fmt: skip
    head, rule, line = script.table({"rows": [row], "settings": {"checkpointing_steps": 10_000}}).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["B/2, 256 tokens, batch 8, routed", "4000", "4200", "0.0%", "0.1%", "0.2%"]
    assert cells[6:] == ["0.7%", "0.2%", "0.0%", "5.0%", "5.5 (2.10 GB)"]  # 0.3 + 0.4 % of schedule and log
