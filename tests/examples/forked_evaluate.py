# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs the evaluation example several times, each in forked processes, for the price of one import.

    python forked_evaluate.py '[{"argv": [...], "processes": 2, "kill": ["batch", 3]}, ...]'

The processes see the environment that torchrun gives them. "kill" ends a run by SIGKILL, on all its processes: "batch"
while that batch's features lie on the disk but are not published, "seconds" that long after its start. A run that is
not killed must end well.
"""

import json
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import evaluate  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402, F401 - the extractor imports it, and it takes seconds
from forking import run_forked  # noqa: E402
from transformers import Dinov2Model  # noqa: E402, F401

from diffusers_tread import files  # noqa: E402


def arm(batch: int) -> None:
    """Makes the process die that is about to publish a batch of the images' features."""
    publish = files.publish

    def deadly_publish(temporary, final):
        if final.parent.name == "images" and final.name == f"batch-{batch:06d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(temporary, final)

    files.publish = deadly_publish


def run(argv: list[str], *, processes: int = 1, kill: list | None = None) -> None:
    kind, when = kill or (None, None)

    def work(rank: int) -> None:
        if kind == "batch":
            arm(when)
        evaluate.main(argv)

    failed = run_forked(work, processes=processes, kill_after=when if kind == "seconds" else None) != 0
    if failed and kill is None:
        raise RuntimeError(f"Expected a run that ends well: {argv}.")
    print(f"{'killed' if failed else 'ended'}: {kill}, {processes} processes", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for entry in json.loads(sys.argv[1]):
        run(**entry)
