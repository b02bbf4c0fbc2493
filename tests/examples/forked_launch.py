# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs the examples several times, each in forked processes, for the price of one import; see `runs.launch`.

    python forked_launch.py '[{"argv": [...], "processes": 2, "fsdp": true, "kill": {"at": [...], "count": 7}}, ...]'

"script" names another example than train_tread. The processes see the environment that torchrun gives them. "kill"
ends a run by SIGKILL, on all its processes: see `arm`; with "rank", when that one is hit; with "send": "SIGTERM" the
run ends itself. "limit" is the size in bytes
beyond which no file may grow. Without the two a run must end well. The last line printed is an exit code for each run.
"""

import importlib
import json
import os
import pkgutil
import re
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
# What is imported late by a step of training, the feature extractor, a pipeline of prompts: seconds in every process.
TRAINING = {"torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"}
EXTRACTOR = {"transformers.models.dinov2.modeling_dinov2"}
SD3 = {"diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "transformers.models.t5.modeling_t5"}
TEXT = {"diffusers.pipelines.flux.pipeline_flux", "transformers.models.t5gemma.modeling_t5gemma"}


def switch_on_fsdp2() -> None:
    """Accelerate has FSDP for accelerators only, but torch's `fully_shard` works on CPUs.

    Switches Accelerate's state over before the example makes its `Accelerator`; all that follows is the real thing.
    """
    state = Accelerator(cpu=True).state
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )


def arm(*, at: list[str], count: int = 1, matching: str | None = None, send: str = "SIGKILL") -> None:
    """Makes this process signal itself at the `count`-th call of these functions, of those whose arguments match."""

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count -= matching is None or re.search(matching, str(args)) is not None
            if count == 0:
                os.kill(os.getpid(), signal.Signals[send])
            return function(*args, **kwargs)

        return call

    for name in at:
        owner, _, attribute = name.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, attribute, deadly(getattr(owner, attribute)))


def run(
    argv: list[str],
    *,
    script: str = "train_tread",
    processes: int = 1,
    fsdp: bool = False,
    kill: dict | None = None,
    limit: int | None = None,
) -> int:
    def work(rank: int) -> None:
        if fsdp:
            switch_on_fsdp2()
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if kill is not None and kill.pop("rank", rank) == rank:
            arm(**kill)
        importlib.import_module(script).main(argv)

    code = run_forked(work, processes=processes)
    if code != 0 and kill is None and limit is None:
        raise RuntimeError(f"Expected a run that ends well: {argv}.")
    return code


def run_forked(work: Callable[[int], None], *, processes: int) -> int:
    """Calls `work(rank)` in forked processes, as a launcher does in new ones.

    Returns:
        0 if all end well; else the exit code of the first that does not (minus the signal's number), after which the
        others are killed, as a launcher does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = [start(work, rank, processes, port) for rank in range(processes)]

    # One that is killed may take others with it before this looks: what counts is the strongest sign of a death.
    codes = []
    while children:
        child, status = os.wait()
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] == 0:
            continue
        for other in children:
            gone, status = os.waitpid(other, os.WNOHANG)
            if gone:
                codes.append(os.waitstatus_to_exitcode(status))
            else:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
        children = []
    return max(codes, key=abs)


def start(work: Callable[[int], None], rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        work(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = json.loads(sys.argv[1])
    modules = {entry.get("script", "train_tread") for entry in plan}
    if any("train" in name for name in modules):
        modules |= TRAINING
    if "train_text_to_image_tread" in modules:
        modules |= SD3 | TEXT
    if "transformers:" in sys.argv[1] or "alignment" in sys.argv[1]:
        modules |= EXTRACTOR
    if "--prompts" in sys.argv[1]:
        modules |= SD3
    for name in modules:
        importlib.import_module(name)
    print(json.dumps([run(**entry) for entry in plan]))
