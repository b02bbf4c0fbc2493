# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Averages, gathers and loads weights for diffusers' `EMAModel`, whole (one process, DDP) or sharded (FSDP2)."""

from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_ema(ema: EMAModel, parameters: Iterable[torch.Tensor]) -> None:
    """Does the same as `ema.step(parameters)`, up to rounding, but in one pass and without copying the weights.

    Args:
        ema: Its averages and its `optimization_step` are changed in place.
        parameters: The parameters that `ema` was made from, sharded in the same way. All of them are averaged.
    """
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    average = get_ema_multi_avg_fn(ema.cur_decay_value)
    average(local_shards(ema.shadow_params), local_shards(parameters), None)


def local_shards(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The part of each weight on this process: its shard under FSDP2, else the whole weight. Storage is shared."""
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]


def whole_weights(
    weights: Iterable[torch.Tensor], names: Iterable[str], *, device: "torch.device | str"
) -> dict[str, torch.Tensor]:
    """Gathers whole weights by name; a weight that is not sharded and already on `device` is not copied.

    Args:
        weights: A model's parameters or `EMAModel.shadow_params`. If FSDP2 shards them, all processes must call this
            together, and each gets all weights.
        names: Names from the model's `named_parameters`, before Accelerate prepared it.
        device: Device to put the weights on, one after the other.
    """
    named = zip(names, weights, strict=True)
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().to(device).contiguous()
        for name, weight in named
    }


@torch.no_grad()
def load_ema(ema: EMAModel, path: Path, names: list[str]) -> None:
    """Loads averaged weights from a safetensors file; each process keeps its own shards.

    Args:
        ema: Its averages are overwritten.
        path: File with the output of `whole_weights`.
        names: Names of the averages, in their order.

    Raises:
        ValueError: The names in the file differ.
    """
    weights = safetensors.torch.load_file(path)
    if set(weights) != set(names):
        raise ValueError(f"Expected averaged weights {sorted(names)[:3]}..., got {sorted(weights)[:3]}... in {path}.")
    for name, shadow in zip(names, ema.shadow_params, strict=True):
        weight = weights[name].to(shadow.device)
        if isinstance(shadow, DTensor):
            weight = distribute_tensor(weight, shadow.device_mesh, shadow.placements)
        shadow.copy_(weight)
