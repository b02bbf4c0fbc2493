# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The optimisers that --optimizer names: AdamW, and Muon on the matrices of the blocks with AdamW on all else."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..hooks import main_stacks
from ..registry import add_entry
from ..routing import RoutedStack
from .config import RunConfig


Groups = list[dict[str, Any]]

OPTIMIZERS: dict[str, Callable[[RunConfig, nn.Module], torch.optim.Optimizer]] = {}

# Linear layers of blocks that are neither attention nor MLP: modulations, embedders.
_OTHER_LAYERS = re.compile("norm|mod|adaln|emb", re.IGNORECASE)


def register_optimizer(name: str, make: Callable[[RunConfig, nn.Module], torch.optim.Optimizer]) -> None:
    """Makes an optimiser known to the training scripts.

    Args:
        name: For --optimizer.
        make: From a config and a model, not yet wrapped, an optimiser of its parameters that require gradients. It is
            also called with a model on the meta device, before anything is written, to see what it refuses. Rates and
            decays are those that its groups begin with, times the schedule, whatever a checkpoint says.

    Raises:
        ValueError: Another optimiser is called so.
    """
    add_entry(OPTIMIZERS, name, make)


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of --optimizer for a model's parameters that require gradients.

    Raises:
        ValueError: An unknown name; else as the optimiser.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"Expected --optimizer among {list(OPTIMIZERS)}, got {config.optimizer!r}.")
    return OPTIMIZERS[config.optimizer](config, model)


def read_group_settings(optimizer: torch.optim.Optimizer) -> Groups:
    """What the groups say besides their parameters, such as rates and decays, to be set again after a checkpoint."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


# AdamW.


def make_adamw(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW, fused."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return _adamw(config, model, parameters)


def _adamw(config: RunConfig, model: nn.Module, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """Of some parameters, by their names in the model; the layout of its groups does not depend on the decay."""
    groups = []
    for decay in (config.adam_weight_decay, 0.0):
        is_decayed = not groups
        chosen = [one for name, one in parameters.items() if decays(model, name) == is_decayed]
        groups.append({"params": chosen, "weight_decay": decay})
    betas = (config.adam_beta1, config.adam_beta2)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def decays(model: nn.Module, name: str) -> bool:
    """Whether weight decay is for a parameter: weights of linear and convolutional layers.

    It is not for what has fewer than two dimensions (norms, biases, a scan's decay rates and time steps), nor for
    embeddings and tables.
    """
    owner, _, own_name = name.rpartition(".")
    layer = model.get_submodule(owner)
    return own_name == "weight" and layer.weight.dim() > 1 and not isinstance(layer, nn.Embedding)


# Muon.


def make_muon(config: RunConfig, model: nn.Module) -> "MuonWithAdamW":
    """Muon on the matrices of attention and MLP in the blocks, AdamW on all else.

    Raises:
        ValueError: torch has no Muon; the model has no blocks with such matrices.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"Expected torch >= 2.9, the first with torch.optim.Muon, for --optimizer muon, got {torch.__version__}. "
            "Upgrade torch, or use --optimizer adamw."
        )
    matrices = find_matrices(model)
    if not matrices:
        raise ValueError(
            f"Expected a model with blocks whose matrices Muon trains, got {type(model).__name__} without. Use "
            "--optimizer adamw."
        )
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    others = {name: one for name, one in parameters.items() if name not in matrices}
    groups = []
    for rows in dict.fromkeys(matrices.values()):
        chosen = [parameters[name] for name, its_rows in matrices.items() if its_rows == rows]
        groups.append({"params": chosen, "rows": rows})
    muon = torch.optim.Muon(
        groups,
        lr=config.muon_learning_rate,
        momentum=config.muon_momentum,
        weight_decay=config.muon_weight_decay,
        adjust_lr_fn=config.muon_adjust_lr_fn,
    )
    return MuonWithAdamW(muon, _adamw(config, model, others))


def find_matrices(model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """The weights that Muon trains, those of attention and MLP in the model's blocks.

    Args:
        model: A denoiser with a `RoutedStack`, a diffusers transformer, or a module that has one as `transformer`.

    Returns:
        By a weight's name in the model how many rows each matrix in it has; None if it is one matrix.
    """
    found, names = {}, {one: name for name, one in model.named_parameters()}
    for stack in _block_stacks(model):
        for name, layer in stack.named_modules():
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad and not _OTHER_LAYERS.search(name):
                found[names[layer.weight]] = _stacked_rows(name, *layer.weight.shape)
    return found


def _block_stacks(model: nn.Module) -> list[nn.Module]:
    stacks: list[nn.Module] = [module for module in model.modules() if isinstance(module, RoutedStack)]
    transformer = getattr(model, "transformer", model)
    return stacks or [transformer.get_submodule(name) for name in main_stacks(transformer)]


def _stacked_rows(name: str, rows: int, columns: int) -> tuple[int, ...] | None:
    """The rows of query, key and value in a layer that has them one above the other, told by its name."""
    own_name = name.rpartition(".")[2]
    if "qkv_mlp" in own_name:  # Flux.2's, with the MLP below them
        return (columns,) * 3 + (rows - 3 * columns,)
    count = 3 if "qkv" in own_name else 2 if "kv" in own_name else 1
    return None if count == 1 or rows % count else (rows // count,) * count


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimiser, which has the groups and the state of both.

    A weight that holds several matrices one above the other, such as query, key and value, is trained as several. Of
    one that FSDP2 shards each process gathers weight, gradient and momentum, one weight at a time, takes the whole
    step and keeps its shards of it: the same numbers as without shards, for three gathers of the weight.

    Args:
        muon: Its groups say in `rows` how many rows each matrix of their weights has, None for one matrix.
        adamw: Of all other parameters.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        # AdamW's come first: their rate is the one that is logged.
        super().__init__([*adamw.param_groups, *muon.param_groups], {"lr": adamw.defaults["lr"]})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # Groups and state are replaced when a checkpoint is loaded, so each step hands them over.
        self.adamw.param_groups = [group for group in self.param_groups if "rows" not in group]
        self.adamw.state = self.state
        self.adamw.step()

        for group in self.param_groups:
            for weight in group["params"] if "rows" in group else ():
                if weight.grad is not None:
                    self._step_weight(weight, group)
        return loss

    def _step_weight(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        """Muon's step of the matrices in a weight."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        own = (weight.detach(), weight.grad, state["momentum_buffer"])
        whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in own]

        # Each matrix is a view, so that Muon changes the weight and its momentum in place.
        rows = group["rows"] or (len(weight),)
        matrices, self.muon.state = [], {}
        for matrix, gradient, momentum in zip(*(one.split(rows) for one in whole), strict=True):
            matrix.grad = gradient
            self.muon.state[matrix] = {"momentum_buffer": momentum}
            matrices.append(matrix)
        self.muon.param_groups = [group | {"params": matrices}]
        self.muon.step()
        self.muon.state = {}

        if isinstance(weight, DTensor):
            for shards, one in zip(own, whole, strict=True):
                shards.copy_(distribute_tensor(one, weight.device_mesh, weight.placements, src_data_rank=None))


register_optimizer("adamw", make_adamw)
register_optimizer("muon", make_muon)
