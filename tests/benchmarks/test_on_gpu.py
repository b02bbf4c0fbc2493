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
from convergence_data import Images


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.sh"
REPORTS = """
    train_step profile_step routing_overhead sampling train_step_base train_step_long train_step_batch_256
    training_loop convergence
""".split()


@pytest.fixture
def run(tmp_path):
    """Runs parts of the script on the CPU; results go to `tmp_path`."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    pixels, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 4
    names = ("grey", "red", "green", "blue")
    images = Images(
        train_images=pixels, train_labels=labels, heldout_images=pixels, heldout_labels=labels, class_names=names
    )
    images.save(tmp_path / "avatars.npz")
    settings = {"SMOKE": "1", "DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings |= {"OUT": str(tmp_path), "DATA": str(tmp_path / "avatars.npz")}

    def call(*parts, **changes):
        command = ["bash", str(SCRIPT), *parts]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings | changes)

    return call


@pytest.mark.slow
def test_every_part_starts_and_reports(run, tmp_path):
    pytest.importorskip("datasets")
    result = run("checks", "speed", "rest", "evidence")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in (tmp_path / "tests_gpu.log").read_text()
    for name in REPORTS:
        report = json.loads((tmp_path / f"{name}_smoke.json").read_text())
        assert report["command"].startswith("python benchmarks/") and report["hardware"]["device"] == "cpu"
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(f"{name}_smoke" for name in REPORTS)
    assert all(one["finished"] for one in report["runs"])  # the last one's


@pytest.mark.slow
def test_a_part_that_fails_is_told(run, tmp_path):
    result = run("evidence", DATA=str(tmp_path / "missing.npz"))
    assert result.returncode == 1 and "== failed: convergence_smoke" in result.stdout
    assert run("evidance").returncode == 2
