# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""diffusers' `EMAModel` for whole and for sharded (FSDP2) parameters: use for a while, save, load."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
@torch.no_grad()
def averaged_weights(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """Puts the averaged weights into the model inside the `with` block, and the trained ones back after it.

    `EMAModel.store` and `copy_to` do not serve here: with `foreach=True` they fail on sharded parameters, for which
    torch has no `_foreach_copy_`.

    Args:
        ema: The average; None leaves the model alone.
        model: The one whose parameters `ema` was made from; DDP and FSDP2 wrap it as they like.
    """
    if ema is None:
        yield
        return
    trained = [parameter.detach().clone() for parameter in _own_parameters(model)]
    try:
        _copy(ema.shadow_params, _own_parameters(model))
        yield
    finally:
        _copy(trained, _own_parameters(model))


def gather_ema(ema: EMAModel, names: list[str]) -> dict[str, torch.Tensor]:
    """The averaged weights, whole and on the CPU; with sharded parameters all processes must call it together."""
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu().contiguous()
        for name, weight in zip(names, ema.shadow_params, strict=True)
    }


@torch.no_grad()
def load_ema(ema: EMAModel, path: Path, names: list[str]) -> None:
    """Reads what `gather_ema` gave and `safetensors` wrote; each process keeps its own shards.

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


def _own_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    # After a forward without a backward FSDP2 leaves the outermost weights gathered: the model then shows a copy of
    # them, which its next forward uses.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return list(model.parameters())


@torch.no_grad()
def _copy(source: Iterable[torch.Tensor], target: Iterable[torch.Tensor]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)
