# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs of the examples, in this process and in others, and what they leave behind."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from diffusers_tread.runs.checkpoints import list_checkpoints


def call(example, *argv):
    """Runs an example in this process as in a new one."""
    AcceleratorState._reset_state(True)
    example.main([str(word) for word in argv])


def launch(plan):
    """Runs a plan of `forked_launch.py` in one process; the exit codes of its runs and all error output."""
    plan = [entry | {"argv": [str(word) for word in entry["argv"]]} for entry in plan]
    command = [sys.executable, str(Path(__file__).with_name("forked_launch.py")), json.dumps(plan)]
    paths = [str(Path(__file__).parents[2] / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(command, env=environment, timeout=800, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@contextmanager
def interrupting(owner, name, when=lambda *args: True):
    """A block that ends with a KeyboardInterrupt in the first call of a function for which `when` holds."""
    function = getattr(owner, name)

    def interrupted(*args, **kwargs):
        if when(*args):
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, interrupted), pytest.raises(KeyboardInterrupt):
        yield


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def weights_of(run):
    """The final weights of a training: of the model (where one file holds them), of the average, of the pipeline."""
    files = [list_checkpoints(run)[-1] / "model.safetensors", list_checkpoints(run)[-1] / "ema.safetensors"]
    files.append(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    return [safetensors.torch.load_file(file) for file in files if file.exists()]


def assert_bitwise_equal(run, other):
    for weights, others in zip(weights_of(run), weights_of(other), strict=True):
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
