# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The wrapper around a model, which opens and closes a forward.

This wrapper and those of blocks and of the checkpoint function are objects that replace what they wrap. Each holds its
module and finds everything else through it, so a deepcopy (EMA) or a pickle of the model has its own working routing.
diffusers' HookRegistry supports neither.
"""

from collections.abc import Callable
from inspect import Signature, signature
from typing import Any

import torch

from ..routing import RoutingCall, check_can_route
from .specs import ModelSpec
from .state import ForwardPass, RoutedModel
from .wrap_block import BlockForward
from .wrap_checkpoint import wrap_checkpoint_function


class ModelForward:
    """Set as the `forward` of the model: opens a `ForwardPass` for its blocks, and closes it afterwards.

    Takes one argument more than the model: `routing`, a `RoutingCall`.

    Args:
        shared: The model, its router, and the state that its wrappers share.
        spec: The model's stacks, and how to find the routable tokens from its arguments.
        argument_names: The names of its forward's arguments, in order.
    """

    def __init__(self, shared: RoutedModel, *, spec: ModelSpec, argument_names: tuple[str, ...]):
        self.shared = shared
        self.module = shared.model
        self.spec = spec
        self.argument_names = argument_names
        self.before = self.module.__dict__.get("forward")
        self.blocks: list[BlockForward] = []

    def __call__(self, *args: Any, routing: RoutingCall | None = None, **kwargs: Any) -> Any:
        # New tensors for each forward, so that a recomputation in other code's checkpoint finds it by a block's input.
        model, thread = self.module, self.shared.thread
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            args = tuple(_view(value) for value in args)
            kwargs = {name: _view(value) for name, value in kwargs.items()}

        # The forward.
        unwrapped = wrap_checkpoint_function(self.shared)
        outer, thread.running = thread.running, self._open(routing, args, kwargs)
        try:
            if self.before is not None:
                return self.before(*args, **kwargs)
            return type(model).forward(model, *args, **kwargs)
        finally:
            thread.running = outer
            if unwrapped is not None and torch.compiler.is_compiling():
                # If the wrapper stayed, the graph would not fit the next call.
                model._gradient_checkpointing_func = unwrapped

    def _open(self, routing: RoutingCall | None, args: tuple, kwargs: dict[str, Any]) -> ForwardPass:
        # A dense forward.
        shared, training = self.shared, self.module.training
        router, probe = shared.router, shared.thread.probe
        if not shared.is_routing(routing):
            return ForwardPass(router, training=training, call=routing, seed=None, window=None)

        # Checks.
        check_can_route(self.module)
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        for name in self.spec.must_be_none:
            if arguments.get(name) is not None:
                raise ValueError(
                    f"Expected `{name}` of {type(self.module).__name__} to be None in a routed forward: "
                    f"{self.spec.must_be_none[name]}. Leave it out, or switch routing off for this call."
                )

        # A routed forward.
        window = None if self.spec.window is None else self.spec.window(self.module, arguments)
        has_rows = any(route.unit == "row" for route in router.routes)
        grid = self.spec.grid(self.module, arguments) if has_rows and self.spec.grid is not None else None
        seed = router.forward_seed(_device_of(arguments.values()) or "cpu", routing)
        return ForwardPass(router, training=training, call=routing, seed=seed, window=window, grid=grid, probe=probe)

    @property
    def __func__(self) -> Callable:
        # accelerate's `prepare` wraps `model.forward.__func__`, and its `unwrap_model` binds the original to the model
        # again; without this property it would bind this object, which is bound already.
        return forward_of_model

    @property
    def __signature__(self) -> Signature:  # pipelines inspect it
        return signature(self.before if self.before is not None else type(self.module).forward.__get__(self.module))


def forward_of_model(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`ModelForward` as a function of the model, for libraries that rebind methods."""
    return model._token_routing(*args, **kwargs)


def _view(value: Any) -> Any:
    return value.view_as(value) if isinstance(value, torch.Tensor) else value


def _device_of(values: Any) -> "torch.device | None":
    """The device of the first tensor, also in lists of them."""
    for value in values:
        device = value.device if isinstance(value, torch.Tensor) else None
        if isinstance(value, (list, tuple)):
            device = _device_of(value)
        if device is not None:
            return device
    return None
