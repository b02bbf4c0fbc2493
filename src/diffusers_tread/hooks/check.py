# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Tests on a model whether everything that belongs to a token is routed with it."""

from collections.abc import Mapping
from typing import Any

import torch

from ..routing import token_routing
from .apply import model_forward
from .state import Probe
from .wrap_block import BlockForward


@torch.no_grad()
def check_token_routing(model: torch.nn.Module, *, tolerance: float = 1e-4, **inputs: Any) -> float:
    """Runs the routed blocks on all tokens in a random order per sample and compares the output with the dense one.

    They agree only if everything that belongs to a token (positions, masks, modulations) was gathered with it. Do this
    once for a model of your own or a spec you registered. It does not detect text that is routed by mistake, nor any
    mistake that zero weights hide, such as the gates of a freshly initialised model.

    Blocks that convolve over the grid (`BlockSpec.num_rows`) are tested one by one: they get the lower half of the
    rows before the upper half, and only the middle row of each half is compared, because its neighbours are the same.

    Args:
        model: A model with `apply_token_routing`.
        tolerance: Largest difference allowed, relative to the largest value of the dense output.
        inputs: The arguments of the model's forward, with at least two samples. Blocks that convolve need six rows of
            tokens, more for kernels larger than three.

    Returns:
        The largest relative difference found.

    Raises:
        ValueError: The outputs differ by more than `tolerance`; the message names the block classes at fault. Or there
            are fewer than six rows for blocks that convolve.

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
    # Evaluation mode.
    modes = {module: module.training for module in model.modules()}
    blocks = [block for block in model_forward(model).blocks if block.route_index is not None]
    model.eval()

    # Differences of all blocks together, then of each one.
    try:
        if any(block.spec.num_rows is not None for block in blocks):
            errors = _rolled_errors(model, inputs, blocks)
            error = max(errors.values())
        else:
            with token_routing(model, enabled=False):
                dense = _first_output(model(**inputs))
            error, errors = _permuted_error(model, inputs, dense), {}
            if error > tolerance:
                errors = {block: _permuted_error(model, inputs, dense, only=block.module) for block in blocks}
        if error > tolerance:
            guilty = {type(block.module).__name__ for block in blocks if errors[block] > tolerance}
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
    """Largest difference to `dense`, relative to its largest value, when all tokens are kept but permuted."""
    return _relative_error(_first_output(_probed(model, inputs, Probe(only))), dense)


def _rolled_errors(
    model: torch.nn.Module, inputs: Mapping[str, Any], blocks: list[BlockForward]
) -> dict[BlockForward, float]:
    """Per block the largest difference in the middle rows of both halves, with the lower half of the rows first."""
    # The middle rows.
    grid: Any = model_forward(model).spec.grid
    frames, height, width = (1, *grid(model, inputs))[-3:]
    upper, lower = height - height // 2, height // 2
    if lower < 3:
        raise ValueError(f"Expected at least six rows of tokens to check blocks that convolve, got {height}.")
    middle = [(upper - 1) // 2, upper + (lower - 1) // 2]

    # Their tokens after each block.
    seen: dict[torch.nn.Module, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        tokens = output[module.forward.spec.output] if isinstance(output, (tuple, list)) else output
        seen[module] = tokens.unflatten(1, (frames, height, width))[:, :, middle]

    # Dense, and then with one block rolled at a time.
    handles = [block.module.register_forward_hook(keep) for block in blocks]
    try:
        with token_routing(model, enabled=False):
            model(**inputs)
        dense, errors = dict(seen), {}
        for block in blocks:
            _probed(model, inputs, Probe(block.module, rolled=True))
            errors[block] = _relative_error(seen[block.module], dense[block.module])
        return errors
    finally:
        for handle in handles:
            handle.remove()


def _probed(model: torch.nn.Module, inputs: Mapping[str, Any], probe: Probe) -> Any:
    """The model's output with all tokens in another order."""
    thread = model_forward(model).shared.thread
    thread.probe = probe
    try:
        with token_routing(model, seed=0):  # has no effect here, but without it a seed would be drawn
            return model(**inputs)
    finally:
        thread.probe = None


def _relative_error(output: torch.Tensor, dense: torch.Tensor) -> float:
    return ((output - dense).abs().max() / dense.abs().max().clamp_min(1e-30)).item()


def _first_output(output: Any) -> Any:
    """The prediction among what a model returned; a list of samples is stacked."""
    while not isinstance(output, torch.Tensor):
        if isinstance(output, (tuple, list)) and output[1:] and all(isinstance(x, torch.Tensor) for x in output):
            return torch.stack(list(output)) if len({x.shape for x in output}) == 1 else output[0]
        output = output[0]
    return output
