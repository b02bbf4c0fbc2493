# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The optimisers for --optimizer: AdamW, and Muon for the matrices of the blocks with AdamW for all else."""

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

# Names of linear layers in blocks that are neither attention nor MLP: modulations, embedders.
_OTHER_LAYERS = re.compile("norm|mod|adaln|emb", re.IGNORECASE)


def register_optimizer(name: str, make: Callable[[RunConfig, nn.Module], torch.optim.Optimizer]) -> None:
    """Registers an optimiser for the training scripts.

    Args:
        name: Value of --optimizer that selects it.
        make: Makes the optimiser for the parameters that require gradients, from a config and a model that is not yet
            wrapped. It is also called with a model on the meta device, before anything is written, to raise its errors
            early. Learning rates and weight decays are those of the new optimiser's groups (rates times the schedule),
            even after a checkpoint is loaded.

    Raises:
        ValueError: The name is taken by another optimiser.
    """
    add_entry(OPTIMIZERS, name, make)


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimiser of --optimizer for a model's parameters that require gradients.

    Raises:
        ValueError: The name is unknown, or the optimiser does not fit the model.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"Expected --optimizer among {list(OPTIMIZERS)}, got {config.optimizer!r}.")
    return OPTIMIZERS[config.optimizer](config, model)


def read_group_settings(optimizer: torch.optim.Optimizer) -> Groups:
    """The settings of the parameter groups, such as rates and decays, to be restored after a checkpoint is loaded."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


# AdamW.


def make_adamw(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """Makes a fused AdamW for all parameters that require gradients."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return _adamw(config, model, parameters)


def _adamw(config: RunConfig, model: nn.Module, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """Makes AdamW for parameters given by their names in `model`. Its groups do not depend on the weight decay."""
    groups = []
    for decay in (config.adam_weight_decay, 0.0):
        is_decayed = not groups
        chosen = [one for name, one in parameters.items() if decays(model, name) == is_decayed]
        groups.append({"params": chosen, "weight_decay": decay})
    betas = (config.adam_beta1, config.adam_beta2)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def decays(model: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a parameter: only to weights of linear and convolutional layers.

    It does not apply to parameters with fewer than two dimensions (norms, biases, a scan's decay rates and time
    steps), nor to embeddings and tables.
    """
    owner, _, own_name = name.rpartition(".")
    layer = model.get_submodule(owner)
    return own_name == "weight" and layer.weight.dim() > 1 and not isinstance(layer, nn.Embedding)


# Muon.


def make_muon(config: RunConfig, model: nn.Module) -> "MuonWithAdamW":
    """Makes Muon for the matrices of attention and MLP in the blocks, with AdamW for all else.

    Raises:
        ValueError: torch has no Muon; the model has no blocks with such matrices.
    """
    # What Muon can train.
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

    # One group of matrices per layout of rows.
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
    """Finds the weights that Muon trains: those of attention and MLP in the model's blocks.

    Args:
        model: A denoiser with a `RoutedStack`, a diffusers transformer, or a module that has one as `transformer`.

    Returns:
        For each weight, by its name in the model, the number of rows of each matrix stacked in it; None if the weight
        is a single matrix.
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
    """The numbers of rows of query, key and value in a layer that stacks them, according to its name."""
    own_name = name.rpartition(".")[2]
    if "qkv_mlp" in own_name:  # Flux.2, with the MLP below query, key and value
        return (columns,) * 3 + (rows - 3 * columns,)
    count = 3 if "qkv" in own_name else 2 if "kv" in own_name else 1
    return None if count == 1 or rows % count else (rows // count,) * count


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimiser, which has the groups and the state of both.

    If a weight stacks several matrices, such as query, key and value, Muon treats each one separately. For a weight
    that FSDP2 shards, each process gathers weight, gradient and momentum, takes the whole step and keeps its shard of
    the result, one weight at a time. The numbers are the same as without shards, at the cost of three gathers.

    Args:
        muon: The key `rows` of its groups gives the number of rows of each matrix in a weight; None for one matrix.
        adamw: Trains all other parameters.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        # AdamW's groups come first: the rate of the first group is logged.
        super().__init__([*adamw.param_groups, *muon.param_groups], {"lr": adamw.defaults["lr"]})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # AdamW. Loading a checkpoint replaces groups and state, so they are handed over at each step.
        self.adamw.param_groups = [group for group in self.param_groups if "rows" not in group]
        self.adamw.state = self.state
        self.adamw.step()

        # Muon.
        for group in self.param_groups:
            for weight in group["params"] if "rows" in group else ():
                if weight.grad is not None:
                    self._step_weight(weight, group)
        return loss

    def _step_weight(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        """Takes Muon's step for the matrices in a weight."""
        # Gather what is sharded.
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

        # Keep this process's shards of the result.
        if isinstance(weight, DTensor):
            for shards, one in zip(own, whole, strict=True):
                shards.copy_(distribute_tensor(one, weight.device_mesh, weight.placements, src_data_rank=None))


register_optimizer("adamw", make_adamw)
register_optimizer("muon", make_muon)
