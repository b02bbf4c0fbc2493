# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Tests on a model that what belongs to a token is routed with it."""

from collections.abc import Mapping
from typing import Any

import torch

from ..routing import token_routing
from .apply import model_forward
from .state import Probe


@torch.no_grad()
def check_token_routing(model: torch.nn.Module, *, tolerance: float = 1e-4, **inputs: Any) -> float:
    """Runs the routed blocks on all tokens in a random order per sample and compares the output with the dense one.

    They agree only if everything that belongs to a token (positions, masks, modulations) was gathered with it. Do this
    once for a model of your own or a spec you registered. It does not see text that is routed by mistake, and no
    mistake at all through weights that are zero, such as the gates of a freshly initialised model.

    Args:
        model: A model with `apply_token_routing`.
        tolerance: Largest difference allowed, relative to the largest value of the dense output.
        inputs: The arguments of the model's forward. At least two samples.

    Returns:
        The largest relative difference found.

    Raises:
        ValueError: The outputs differ by more; names the block classes at fault.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffusers_tread import TokenRoute, apply_token_routing, check_token_routing
        >>> transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=8)
        >>> router = apply_token_routing(transformer, TokenRoute(start=2, end=-4))
        >>> latents, timestep, labels = torch.randn(2, 4, 32, 32), torch.tensor([10, 500]), torch.tensor([3, 7])
        >>> error = check_token_routing(
        ...     transformer, hidden_states=latents, timestep=timestep, class_labels=labels
        ... )
    """
    forward, modes = model_forward(model), {module: module.training for module in model.modules()}
    model.eval()
    try:
        with token_routing(model, enabled=False):
            dense = _first_output(model(**inputs))
        error = _permuted_error(model, inputs, dense)
        if error > tolerance:
            guilty = {
                type(block.module).__name__
                for block in forward.blocks
                if block.route_index is not None
                and _permuted_error(model, inputs, dense, only=block.module) > tolerance
            }
            raise ValueError(
                f"Expected the same output for permuted tokens, got a relative difference of {error:.1e}. Something "
                f"that belongs to a token was not gathered in {sorted(guilty)}: correct the spec with "
                "register_block_spec, see docs/routing-any-model.md."
            )
        return error
    finally:
        for module, training in modes.items():
            module.training = training


def _permuted_error(
    model: torch.nn.Module, inputs: Mapping[str, Any], dense: torch.Tensor, *, only: torch.nn.Module | None = None
) -> float:
    """Largest difference to `dense`, relative to its largest value, with the kept tokens being all, permuted."""
    thread = model_forward(model).shared.thread
    thread.probe = Probe(only)
    try:
        with token_routing(model, seed=0):  # of no account here, and else drawn
            output = _first_output(model(**inputs))
    finally:
        thread.probe = None
    return ((output - dense).abs().max() / dense.abs().max().clamp_min(1e-30)).item()


def _first_output(output: Any) -> torch.Tensor:
    """The prediction among what a model returned; a list of samples is stacked."""
    while not isinstance(output, torch.Tensor):
        if isinstance(output, (tuple, list)) and all(isinstance(x, torch.Tensor) for x in output) and len(output) > 1:
            return torch.stack(list(output)) if len({x.shape for x in output}) == 1 else output[0]
        output = output[0]
    return output
