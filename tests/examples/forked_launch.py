# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs the examples several times, each in forked processes, for the price of one import.

    python forked_launch.py '[{"argv": [...], "processes": 2, "fsdp": true, "kill": ["step", 7]}, ...]'

"script" names another example than train_tread. The processes see the environment that torchrun gives them. "kill"
ends a run by SIGKILL, on all its processes: "step" in the middle of an optimiser step of train_tread, "seal" while a
checkpoint lies on the disk but is not published, "image" where sample.py has published that many images and is about
to publish the next; "stop" tells the second process to stop in a step, and leaves the rest to the run. A run that is
not killed must end well.
"""

import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 - FSDP2 imports it, and it takes seconds
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
import train_tread  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from forking import run_forked  # noqa: E402

from diffusers_tread import files  # noqa: E402
from diffusers_tread.runs import checkpoints  # noqa: E402


def switch_on_fsdp2() -> None:
    """Accelerate has FSDP for accelerators only, but torch's `fully_shard` works on CPUs.

    Switches Accelerate's state over before the example makes its `Accelerator`; all that follows is the real thing.
    """
    state = Accelerator(cpu=True).state
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )


def arm(kind: str, at: int) -> None:
    """Makes this process kill itself at a step, when it seals the checkpoint of a step, or at an image."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    next_batch, seal, publish = train_tread.Trainer.next_batch, checkpoints._seal, files.publish
    published, train_step = itertools.count(), train_tread.Trainer.train_step

    def deadly_next_batch(trainer, micro_step):
        if trainer.step == at and micro_step == 1:
            die()
        return next_batch(trainer, micro_step)

    def deadly_seal(folder, **options):
        seal(folder, **options)
        if folder.name == f"checkpoint-{at}.tmp":
            die()

    def deadly_publish(temporary, final):
        if final.suffix == ".png" and next(published) == at:
            die()
        publish(temporary, final)

    def told_train_step(trainer):
        if trainer.step == at and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer)

    if kind == "stop":
        train_tread.Trainer.train_step = told_train_step
    elif kind == "image":
        files.publish = deadly_publish
    elif kind == "step":
        train_tread.Trainer.next_batch = deadly_next_batch
    else:
        checkpoints._seal = deadly_seal


def run(
    argv: list[str],
    *,
    script: str = "train_tread",
    processes: int = 1,
    fsdp: bool = False,
    kill: tuple[str, int] | None = None,
) -> None:
    example = importlib.import_module(script)

    def work(rank: int) -> None:
        if fsdp:
            switch_on_fsdp2()
        if kill is not None:
            arm(*kill)
        example.main(argv)

    if (run_forked(work, processes=processes) != 0) != (kill is not None):
        raise RuntimeError(f"Expected a run that {'dies' if kill else 'ends well'}: {argv}.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for entry in json.loads(sys.argv[1]):
        run(**entry)
