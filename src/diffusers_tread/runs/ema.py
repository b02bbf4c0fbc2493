# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Weights and diffusers' `EMAModel`, whole (one process, DDP) and sharded (FSDP2): average, gather, load."""

from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_ema(ema: EMAModel, parameters: Iterable[torch.Tensor]) -> None:
    """What `ema.step(parameters)` does, up to rounding, in one pass over the weights and without a copy of them.

    Args:
        ema: Changed in place: its averages and `optimization_step`.
        parameters: As it was made of, all to be averaged, whole or sharded as its averages are.
    """
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    average = get_ema_multi_avg_fn(ema.cur_decay_value)
    average(local_shards(ema.shadow_params), local_shards(parameters), None)


def local_shards(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds of weights, sharing their storage: shards of FSDP2's, others whole."""
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]


def whole_weights(
    weights: Iterable[torch.Tensor], names: Iterable[str], *, device: "torch.device | str"
) -> dict[str, torch.Tensor]:
    """Weights by their names, whole; those that are neither sharded nor elsewhere share their storage with `weights`.

    Args:
        weights: A model's parameters or `EMAModel.shadow_params`. If FSDP2 shards them, all processes must call this
            together, and each gets all of them.
        names: As `named_parameters` of the model had them before it was prepared.
        device: Where to put them, one after the other.
    """
    named = zip(names, weights, strict=True)
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().to(device).contiguous()
        for name, weight in named
    }


@torch.no_grad()
def load_ema(ema: EMAModel, path: Path, names: list[str]) -> None:
    """Reads averaged weights that `whole_weights` gave and `safetensors` wrote; each process keeps its own shards.

    Raises:
        ValueError: The file holds other weights.
    """
    weights = safetensors.torch.load_file(path)
    if set(weights) != set(names):
        raise ValueError(f"Expected averaged weights {sorted(names)[:3]}..., got {sorted(weights)[:3]}... in {path}.")
    for name, shadow in zip(names, ema.shadow_params, strict=True):
        weight = weights[name].to(shadow.device)
        if isinstance(shadow, DTensor):
            weight = distribute_tensor(weight, shadow.device_mesh, shadow.placements)
        shadow.copy_(weight)
