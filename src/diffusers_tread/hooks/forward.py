# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The wrappers around a model and its checkpoint function.

Each wrapper is an object set as its module's `forward`. It holds its module and finds everything else through it, so a
deepcopy (EMA) or a pickle of the model carries routing of its own. diffusers' HookRegistry does neither.
"""

from collections.abc import Callable
from functools import partial
from inspect import Signature, signature
from typing import Any

import torch

from ..routing import TokenRouter
from .block_forward import BlockForward
from .block_specs import ModelSpec
from .forward_pass import ForwardPass


class ModelForward:
    """Set as the `forward` of the model: opens a `ForwardPass` for the blocks below, closes it afterwards.

    Args:
        model: The model.
        spec: Where its stacks are, and how its arguments tell the routable tokens.
        router: Its router.
        argument_names: The names of its forward's arguments, in order.
    """

    def __init__(
        self, model: torch.nn.Module, *, spec: ModelSpec, router: TokenRouter, argument_names: tuple[str, ...]
    ):
        self.module = model
        self.spec = spec
        self.router = router
        self.argument_names = argument_names
        self.before = model.__dict__.get("forward")
        self.blocks: list[BlockForward] = []
        self.running: ForwardPass | None = None
        self.permute = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, outer = self.module, self.running
        self.running = running = self._open(args, kwargs)
        checkpointing = getattr(model, "gradient_checkpointing", False)
        if checkpointing:
            original = model._gradient_checkpointing_func
            model._gradient_checkpointing_func = CheckpointForward(original, running)
        try:
            if self.before is not None:
                return self.before(*args, **kwargs)
            return type(model).forward(model, *args, **kwargs)
        finally:
            self.running = outer
            if checkpointing:
                model._gradient_checkpointing_func = original

    def is_routing(self) -> bool:
        return self.permute or self.router.is_routing(self.module.training)

    def _open(self, args: tuple, kwargs: dict[str, Any]) -> ForwardPass:
        training = self.module.training
        if not self.is_routing():
            return ForwardPass(self.router, training=training, seed=None, window=None)
        parallel = getattr(self.module, "_parallel_config", None)
        if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
            raise ValueError(
                "Expected a model without context parallelism, which splits the sequence by position. Disable it, or "
                "switch routing off: token_routing(model, enabled=False)."
            )
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        for name in self.spec.must_be_none:
            if arguments.get(name) is not None:
                raise ValueError(
                    f"Expected `{name}` of {type(self.module).__name__} to be None in a routed forward: "
                    f"{self.spec.must_be_none[name]}. Leave it out, or switch routing off for this call."
                )
        window = None if self.spec.window is None else self.spec.window(self.module, arguments)
        seed = self.router.forward_seed(_device_of(arguments.values()) or "cpu")
        return ForwardPass(self.router, training=training, seed=seed, window=window, permute=self.permute)

    @property
    def __func__(self) -> Callable:
        # accelerate's `prepare` wraps `model.forward.__func__`, and its `unwrap_model` binds what it finds underneath
        # to the model again; without this it would bind this object, which is bound already.
        return forward_of_model

    @property
    def __signature__(self) -> Signature:  # pipelines look at it
        return signature(self.before if self.before is not None else type(self.module).forward.__get__(self.module))


class CheckpointForward:
    """Stands in for the model's checkpoint function during one forward.

    Gathers and puts back outside the checkpoint and lets it run the bare block on the short input. So nothing about
    routing has to be known again in the recomputation, and the checkpoint stores less.
    """

    def __init__(self, checkpoint: Callable, running: ForwardPass):
        self.checkpoint = checkpoint
        self.running = running

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        block = getattr(function, "__self__", function)  # some models pass `block.__call__`
        forward = block.__dict__.get("forward") if isinstance(block, torch.nn.Module) else None
        if not isinstance(forward, BlockForward):
            return self.checkpoint(function, *args, **kwargs)
        run = partial(self.checkpoint, RoutedBlock(block))
        return forward.route(self.running, run, args, kwargs, inside=False)


class RoutedBlock:
    """Calls a block, hooks and all, whose tokens have been gathered."""

    def __init__(self, block: torch.nn.Module):
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, token_routing_done=True, **kwargs)


def forward_of_model(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`ModelForward` as a function of the model, for libraries that rebind methods."""
    return model._token_routing(*args, **kwargs)


def _device_of(values: Any) -> "torch.device | None":
    """The device of the first tensor, also in lists of them."""
    for value in values:
        device = value.device if isinstance(value, torch.Tensor) else None
        if isinstance(value, (list, tuple)):
            device = _device_of(value)
        if device is not None:
            return device
    return None
