# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The wrapper around a model's checkpoint function, which keeps gathering and putting back outside of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .state import RoutedModel
from .wrap_block import BlockForward


class CheckpointForward:
    """Set as the model's checkpoint function.

    Gathers and puts back outside the checkpoint, which runs the bare block on the short input. So the recomputation
    needs to know nothing about routing, and the checkpoint stores less.

    Args:
        checkpoint: The model's own checkpoint function.
        shared: The state shared by the model's wrappers.
    """

    def __init__(self, checkpoint: Callable, shared: RoutedModel):
        self.checkpoint = checkpoint
        self.shared = shared

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        block = getattr(function, "__self__", function)  # some pass `block.__call__`
        running = self.shared.thread.running
        forward = block.__dict__.get("forward") if isinstance(block, torch.nn.Module) else None
        if running is None or not isinstance(forward, BlockForward):
            return self.checkpoint(function, *args, **kwargs)
        run = partial(self.checkpoint, RoutedBlock(block))
        return forward.route(running, run, args, kwargs, inside=False)


def wrap_checkpoint_function(shared: RoutedModel) -> Callable | None:
    """Wraps the checkpoint function of a model that uses one. Returns the bare function, or None if none was wrapped.

    Each forward calls this too, because `enable_gradient_checkpointing` may set the function at any time.
    """
    model = shared.model
    function = getattr(model, "_gradient_checkpointing_func", None)
    if function is None or not model.gradient_checkpointing or isinstance(function, CheckpointForward):
        return None
    model._gradient_checkpointing_func = CheckpointForward(function, shared)
    return function


class RoutedBlock:
    """Calls a block, with its hooks, on gathered tokens. Not a `partial`, which cannot be traced in all models."""

    def __init__(self, block: torch.nn.Module):
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, token_routing_done=True, **kwargs)
