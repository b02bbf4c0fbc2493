# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Routed models in two processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import assert_same


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes found, see forked_training.py."""
    folder = tmp_path_factory.mktemp("ranks")
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(Path(__file__).parent / "forked_training.py"), str(port), str(folder)]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        # gloo aborted in `full_tensor` in one of about twenty runs with torch 2.13; wrong gradients do not abort.
        if run.returncode != -signal.SIGABRT:
            break
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def mean_of_ranks(found):
    return {name: (found[0]["alone"][name] + found[1]["alone"][name]) / 2 for name in found[0]["alone"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_checkpointed"])
def test_gradients_are_the_mean_over_the_ranks(found, kind):
    expected = mean_of_ranks(found)
    for rank in range(2):
        assert_same(found[rank][kind], expected)


@pytest.mark.slow
def test_ranks_draw_subsets_of_their_own(found):
    assert found[0]["drawn_seed"] != found[1]["drawn_seed"]
    name = "transformer_blocks.1.attn.to_q.weight"
    assert not torch.allclose(found[0]["alone"][name], found[1]["alone"][name])
