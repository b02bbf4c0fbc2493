# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""One training step of a routed Flux in two processes, under DDP and FSDP2. Run by test_distributed.py.

    python forked_training.py PORT FOLDER

Each process writes what it found to FOLDER/rank.pt.
"""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import tiny_transformers  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from diffusers_tread import TokenRoute, apply_token_routing, get_token_router, token_routing  # noqa: E402


def routed_flux():
    case = tiny_transformers.build("FluxTransformer2DModel")
    apply_token_routing(case.model, TokenRoute(start=1, end=-4))
    case.model.train()
    return case


def step(model, inputs, seed):
    """Loss and gradients of one step."""
    model.zero_grad()
    with token_routing(model, seed=seed):
        loss = model(**inputs, return_dict=False)[0].square().mean()
    loss.backward()
    dist.barrier()  # nothing of the backward is under way when the shards below are gathered
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            grads[name.removeprefix("module.")] = grad.clone()
    return grads


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}

    # One process, each rank with seeds of its own.
    case = routed_flux()
    found["alone"] = step(case.model, case.inputs, seed=rank)

    # Unset seeds differ between ranks that seeded torch differently, as training scripts do.
    torch.manual_seed(100 + rank)
    found["drawn_seed"] = get_token_router(case.model).forward_seed("cpu")

    found["ddp"] = step(DistributedDataParallel(case.model), case.inputs, seed=rank)

    for checkpointing in (False, True):
        case = routed_flux()
        if checkpointing:
            case.model.enable_gradient_checkpointing()
        for block in [*case.model.transformer_blocks, *case.model.single_transformer_blocks]:
            torch.distributed.fsdp.fully_shard(block)
        torch.distributed.fsdp.fully_shard(case.model)
        found["fsdp_checkpointed" if checkpointing else "fsdp"] = step(case.model, case.inputs, seed=rank)

    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    port, folder = sys.argv[1:]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    child = os.fork()
    work(int(child == 0), folder)
    if child != 0:
        _, status = os.waitpid(child, 0)
        sys.exit(status != 0)
    os._exit(0)
