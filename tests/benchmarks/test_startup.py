# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and reports what it measured; how fast a machine is, no test can claim."""

import json
import time

import pytest
import startup
import torch

from diffusers_tread import TREADTransformer2DModel


def test_the_differences_of_imports_are_those_of_pairs(monkeypatch):
    times = iter(["9", "9", "9", "1.0", "1.5", "4", "2.0", "2.25", "4"])  # a warm-up, then two rounds
    monkeypatch.setattr(startup, "run_python", lambda program, args: next(times))
    rows = startup.measure_imports(startup.parse_args(["--repeats", "2"]))
    medians = {row["what"]: row["seconds"]["median"] for row in rows}
    assert medians["`import diffusers_tread`"] == 1.875
    assert medians["import beyond the peer"] == 0.375
    assert medians["`from diffusers_tread import TREADPipeline`"] == 4.0


@pytest.mark.long
def test_an_import_and_a_first_step_are_timed_in_processes_of_their_own(monkeypatch):
    args = startup.parse_args(["--seed", "3"])
    start = time.perf_counter()
    seconds = float(startup.run_python(startup.TIME_IMPORT.format(statement="import json"), args))
    assert 0.0 < seconds < time.perf_counter() - start
    with pytest.raises(RuntimeError, match="no_such_module"):
        startup.run_python(startup.TIME_IMPORT.format(statement="import no_such_module"), args)

    run_python, outputs = startup.run_python, []

    def run_once(*arguments):
        """The second process, as if it took twice as long as the first."""
        if not outputs:
            outputs.append(run_python(*arguments))
            return outputs[0]
        return json.dumps([2 * seconds for seconds in json.loads(outputs[0].splitlines()[-1])])

    monkeypatch.setattr(startup, "run_python", run_once)
    rows = startup.measure_first_step(args)
    *parts, total = [row["seconds"] for row in rows]
    assert len(parts) == 3 and all(part["min"] > 0.0 for part in parts)
    for name in ("min", "max"):
        assert total[name] == pytest.approx(sum(part[name] for part in parts))
    assert total["max"] == pytest.approx(2 * total["min"])


def test_the_report_tells_of_a_checkpoint_that_can_be_resumed_from(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "measure_imports", lambda args: [])
    monkeypatch.setattr(startup, "measure_first_step", lambda args: [])
    model = TREADTransformer2DModel(num_attention_heads=4, num_layers=6, sample_size=16)
    monkeypatch.setattr(TREADTransformer2DModel, "from_preset", lambda preset, sample_size: model)
    path = tmp_path / "startup.json"
    startup.main(["--repeats", "2", "--warmup", "0", "--output", str(path)])
    report = json.loads(path.read_text())

    least = 4 * 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6  # weights, two moments, EMA
    assert [row["what"].split(":")[0] for row in report["rows"]] == ["checkpoint", "files of its sizes"] * 2
    assert all(least < row["megabytes"] < 1.05 * least for row in report["rows"])
    assert all(row["seconds"]["min"] > 0.0 for row in report["rows"])
    assert report["hardware"]["threads"] == torch.get_num_threads()
    assert report["settings"]["preset"] == "S/2"


def test_the_table_gives_medians_and_rates():
    rows = [
        {"what": "an import", "seconds": {"median": 1.234}},
        {"what": "a file", "seconds": {"median": 0.5}, "megabytes": 1000.0},
    ]
    lines = startup.table({"rows": rows}).splitlines()
    assert lines[2:] == ["| an import | 1.23 | - | - |", "| a file | 0.50 | 1,000 | 2,000 |"]


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="Expected a preset"):
        startup.measure_checkpoints(startup.parse_args(["--preset", "M/2"]))
