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
import socket
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import evaluate  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402, F401 - the extractor imports it, and it takes seconds
from transformers import Dinov2Model  # noqa: E402, F401

from diffusers_tread.metrics import feature_store  # noqa: E402


def arm(batch: int) -> None:
    """Makes the process die that is about to publish a batch of the images' features."""
    publish = feature_store.publish

    def deadly_publish(temporary, final):
        if final.parent.name == "images" and final.name == f"batch-{batch:06d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(temporary, final)

    feature_store.publish = deadly_publish


def start(argv: list[str], rank: int, processes: int, port: int, kill: list | None) -> int:
    child = os.fork()
    if child:
        return child
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if kill is not None and kill[0] == "batch":
        arm(kill[1])
    try:
        evaluate.main(argv)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def run(argv: list[str], *, processes: int = 1, kill: list | None = None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(argv, rank, processes, port, kill) for rank in range(processes)]
    if kill is not None and kill[0] == "seconds":
        time.sleep(kill[1])
        for child in children:
            os.kill(child, signal.SIGKILL)

    # As a launcher does: when one process dies, the others go too.
    failed = False
    for _ in range(processes):
        ended, status = os.wait()
        children.remove(ended)
        if status != 0 and not failed:
            failed = True
            for child in children:
                os.kill(child, signal.SIGKILL)
    if failed and kill is None:
        raise RuntimeError(f"Expected a run that ends well: {argv}.")
    print(f"{'killed' if failed else 'ended'}: {kill}, {processes} processes", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for entry in json.loads(sys.argv[1]):
        run(**entry)
