# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What is to run on a GPU starts: a wrong flag is found here, not in the minutes for which there is one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import smoke
import torch
from convergence_data import Images

from diffusers_tread import TREADTransformer2DModel


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.sh"
REPORTS = """
    train_step profile_step routing_overhead sampling train_step_base train_step_long train_step_batch_256
    training_loop text_step alignment_step convergence recipe
""".split()


@pytest.fixture
def environment(tmp_path):
    """The script's settings, with a few random images; results go to `tmp_path`."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 4
    names = ("grey", "red", "green", "blue")
    images = Images(
        train_images=pixels, train_labels=labels, heldout_images=pixels, heldout_labels=labels, class_names=names
    )
    images.save(tmp_path / "avatars.npz")
    settings = {"SMOKE": "1", "DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings |= {"OUT": str(tmp_path), "DATA": str(tmp_path / "avatars.npz")}
    return os.environ | settings


@pytest.mark.long
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_part_starts_and_reports(environment, tmp_path):
    pytest.importorskip("datasets")
    command = ["bash", str(SCRIPT), "checks", "scripts", "speed", "rest", "evidence", "recipe"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in (tmp_path / "tests_gpu.log").read_text()
    for name in REPORTS:
        report = json.loads((tmp_path / f"{name}_smoke.json").read_text())
        assert report["command"].startswith("python benchmarks/") and report["hardware"]["device"] == "cpu"
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(f"{name}_smoke" for name in REPORTS)
    assert all(one["finished"] for one in report["runs"])  # the last one's


def test_a_benchmark_that_fails_is_told_after_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TREADTransformer2DModel._presets, "S/8", dict(TREADTransformer2DModel._presets["S/8"]))
    sizes = "--preset S/8 --shapes 1x4 --repeats 2 --warmup 0"
    lines = ["wrong train_step.py --tokens 5", "unknown sampling.py --step 3"]
    lines += [f"right routing_overhead.py {sizes} --output {tmp_path / 'right.json'}"]
    try:
        assert smoke.main(lines) == 1 and smoke.main(lines[2:]) == 0
    finally:
        torch.compiler.set_stance("default")
    output = capsys.readouterr().out
    assert "== failed: wrong, unknown" in output and output.endswith("== failed: none\n")
    assert len(json.loads((tmp_path / "right.json").read_text())["rows"]) == 1
