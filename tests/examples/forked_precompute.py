# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs examples/precompute_latents.py several times, each in forked processes, for the price of one import.

    python forked_precompute.py '[{"argv": [...], "processes": 2, "kill": [1, 7]}, {"argv": [...], "limit": 9000}]'

The processes see the environment that torchrun gives them. "kill" ends a run by SIGKILL, on all its processes, when
one of them (the first number) comes to the n-th of its `EVENTS`, if it gets there. "limit" is the size in bytes beyond
which no file may grow. Prints, as its last line, an exit code for each run: -9 if a process was killed.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import precompute_latents  # noqa: E402
import torch  # noqa: E402
from forking import run_forked  # noqa: E402

from diffusers_tread.data.latents import encoding  # noqa: E402


# In the middle of a shard, and around each step in which a file is published.
EVENTS = ((encoding, "encode_moments"), (os, "fsync"), (os, "replace"))


def arm(count: int) -> None:
    """Makes this process kill itself at the count-th event."""

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in EVENTS:
        setattr(module, name, deadly(getattr(module, name)))


def run(argv: list[str], *, processes: int = 1, kill: list[int] = (), limit: int | None = None) -> int:
    def work(rank: int) -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if kill and rank == kill[0]:
            arm(kill[1])
        precompute_latents.main(argv)

    return run_forked(work, processes=processes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run(**entry) for entry in json.loads(sys.argv[1])]))
