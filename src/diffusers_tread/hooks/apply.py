# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Adds token routing to an unmodified diffusers transformer, and removes it."""

import inspect
from typing import Any

import torch

from ..routing import TokenRouter
from .specs import (
    BLOCK_SPECS,
    MAIN_STACKS,
    MODEL_SPECS,
    REFUSED_BLOCKS,
    REFUSED_MODELS,
    BlockSpec,
    ModelSpec,
    find_by_class,
)
from .state import RoutedModel
from .wrap_block import BlockForward
from .wrap_checkpoint import CheckpointForward, wrap_checkpoint_function
from .wrap_model import ModelForward, forward_of_model


def apply_token_routing(model: torch.nn.Module, routes: Any, *, stack: str | None = None) -> TokenRouter:
    """Lets tokens skip blocks of a diffusers transformer without changing its classes, weights, config or files.

    In training mode the tokens take the routes; in evaluation mode the model is dense unless `token_routing` sets a
    ratio. Only tokens of the image, video or audio that is being denoised are routed.

    Args:
        model: The transformer itself, not wrapped in DDP or `torch.compile`. LoRA may be added before or after.
        routes: One `TokenRoute`, several, or their mappings; without `rejoin` and `rejoin_from`, which only work with
            the models of this package.
        stack: Attribute name of the stack in which routes count blocks, such as "single_transformer_blocks". None
            (default): they count through all main stacks in the order they run.

    Returns:
        The router, also found by `get_token_router(model)`.

    Raises:
        ValueError: The model has routing already; it or one of its blocks cannot be routed (with the reason); a block
            class is unknown; a route does not fit the model, see `TokenRoute.resolve`; or a route has another
            `rejoin`, a `rejoin_from`, or a `unit` that the model does not support.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from diffusers_tread import TokenRoute, apply_token_routing
        >>> transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=8)
        >>> apply_token_routing(transformer, TokenRoute(start=2, end=-4))
        TokenRouter(routes=[TokenRoute(start=2, end=4, selection_ratio=0.5)], num_layers=8)
    """
    # The blocks and their specs.
    _check_routable(model)
    spec = find_by_class(MODEL_SPECS, model) or ModelSpec()
    stacks = _stack_names(model, spec, stack)
    blocks = [block for name in stacks for block in _blocks(model, name)]
    specs = [_block_spec(block, model, name) for name in stacks for block in _blocks(model, name)]

    # The routes.
    router = TokenRouter(routes, num_layers=len(blocks))
    if not router.routes:
        raise ValueError("Expected at least one route, got none. Use TokenRoute(start=2, end=-4).")
    # The inputs of earlier blocks are not available here, and may have another layout than the routed blocks'. A
    # fusion would need weights that the model's class and files do not have.
    if any(route.rejoin != "state" or route.rejoin_from is not None for route in router.routes):
        raise ValueError(
            f"Expected rejoin='state' in the routes of {type(model).__name__} and no rejoin_from, got "
            f"{list(router.routes)}. Leave both out: they are for the denoisers of this package, whose forward holds "
            "earlier states and whose files have the weights of a fusion."
        )
    _check_units(model, router, spec, blocks, specs)

    # The wrappers of model and blocks.
    shared = RoutedModel(model, router)
    forward = ModelForward(shared, spec=spec, argument_names=_argument_names(model))
    forward.blocks = [
        _wrap(block, block_spec, shared, route_index)
        for index, (block, block_spec) in enumerate(zip(blocks, specs, strict=True))
        for route_index, route in enumerate(router.routes)
        if route.start <= index <= route.end
    ]
    # The model's first block may tell later ones which tokens are text and which image, see `BlockForward._window`.
    first_stack = next(iter(_known_stacks(model, spec)), stacks[0])
    first = _blocks(model, first_stack)[0]
    if all(wrapper.module is not first for wrapper in forward.blocks):
        forward.blocks.insert(0, _wrap(first, _block_spec(first, model, first_stack), shared, None))

    # Set in place.
    for wrapper in forward.blocks:
        wrapper.module.forward = wrapper
    model.forward = forward
    model._token_routing = forward
    model.token_router = router
    wrap_checkpoint_function(shared)
    return router


def main_stacks(model: torch.nn.Module) -> list[str]:
    """The names of a diffusers transformer's main stacks of blocks, in the order they run; empty for other modules."""
    return _known_stacks(model, find_by_class(MODEL_SPECS, model) or ModelSpec())


def remove_token_routing(model: torch.nn.Module) -> None:
    """Removes what `apply_token_routing` added; outputs are bit for bit those of the original model again.

    Raises:
        ValueError: The model has no routing, or something else has wrapped a forward since and must be removed first.
    """
    # Checks.
    forward = model_forward(model)
    wrappers = forward.blocks
    top = model.__dict__.get("forward")
    covered = [w.module for w in wrappers if w.module.__dict__.get("forward") is not w]
    if top is not forward and getattr(top, "__func__", None) is not forward_of_model:
        covered.append(model)
    if covered:
        raise ValueError(
            f"Expected the forward of {type(covered[0]).__name__} as apply_token_routing left it, but it has been "
            "wrapped since (accelerate, offloading, another hook). Remove that first."
        )

    # Restored.
    for wrapper in [*wrappers, forward]:
        if wrapper.before is None:
            del wrapper.module.forward
        else:
            wrapper.module.forward = wrapper.before
    checkpoint = getattr(model, "_gradient_checkpointing_func", None)
    if isinstance(checkpoint, CheckpointForward):
        model._gradient_checkpointing_func = checkpoint.checkpoint
    del model._token_routing, model.token_router


def compile_blocks(model: torch.nn.Module, **compile_options: Any) -> None:
    """Compiles the blocks of a routed model, one graph per block class and token count.

    Use this instead of `model.compile_repeated_blocks`, which would trace the routing around the blocks and recompile
    for each of them. `torch.compile(model)` works too.

    Args:
        model: A model with `apply_token_routing`.
        compile_options: Options of `torch.compile`.

    Raises:
        ValueError: The model has no routing.
    """
    forward = model_forward(model)
    wrapped = {id(wrapper.module) for wrapper in forward.blocks}
    compiled = {}
    for wrapper in forward.blocks:
        block_class = type(wrapper.module)
        if block_class not in compiled:
            compiled[block_class] = torch.compile(block_class.forward, **compile_options)
        wrapper.compiled = compiled[block_class]
    for name in _known_stacks(model, forward.spec):
        for block in _blocks(model, name):
            if id(block) not in wrapped:
                block.compile(**compile_options)


def _check_routable(model: torch.nn.Module) -> None:
    if hasattr(model, "_token_routing"):
        raise ValueError(f"{type(model).__name__} has token routing already. Use remove_token_routing(model) first.")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"Expected a diffusers transformer, got {type(model).__name__}.")
    reason = find_by_class(REFUSED_MODELS, model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be routed: {reason}.")


def _check_units(
    model: torch.nn.Module, router: TokenRouter, spec: ModelSpec, blocks: list[torch.nn.Module], specs: list[BlockSpec]
) -> None:
    """Raises ValueError for a route of rows if the model has no grid, or of tokens over blocks that need rows."""
    for route in router.routes:
        if route.unit == "row" and spec.grid is None:
            raise ValueError(
                f"Expected unit='token' in the routes of {type(model).__name__}, got 'row': nothing in its arguments "
                "tells the grid of its tokens. If they do, say so: register_model_spec(name, ModelSpec(grid=...))."
            )
        for block, block_spec in list(zip(blocks, specs, strict=True))[route.start : route.end + 1]:
            if route.unit == "token" and block_spec.num_rows is not None:
                raise ValueError(
                    f"Expected unit='row' in the routes of {type(model).__name__}, got 'token': "
                    f"{type(block).__name__} works on the grid of its tokens. Use TokenRoute(..., unit='row')."
                )


def _stack_names(model: torch.nn.Module, spec: ModelSpec, stack: str | None) -> list[str]:
    """The names of the stacks in which routes count blocks."""
    known = _known_stacks(model, spec)
    if stack is None:
        if known:
            return known
        raise ValueError(
            f"Expected {type(model).__name__} to have one of the stacks {list(MAIN_STACKS)}, found none. Give the "
            "transformer itself, not a wrapper around it; or name its stack: apply_token_routing(..., stack=...)."
        )
    if not _is_stack(model, stack):
        raise ValueError(f"Expected a stack of {type(model).__name__} such as {known}, got {stack!r}.")
    return [stack]


def _blocks(model: torch.nn.Module, stack: str) -> Any:
    return model.get_submodule(stack)


def _known_stacks(model: torch.nn.Module, spec: ModelSpec) -> list[str]:
    return [name for name in spec.stacks or MAIN_STACKS if _is_stack(model, name)]


def _is_stack(model: torch.nn.Module, name: str) -> bool:
    module: Any = model
    for part in name.split("."):
        module = module._modules.get(part) if isinstance(module, torch.nn.Module) else None
    return isinstance(module, torch.nn.ModuleList) and len(module) > 0


def _block_spec(block: torch.nn.Module, model: torch.nn.Module, stack: str) -> BlockSpec:
    reason = find_by_class(REFUSED_BLOCKS, block)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be routed: {type(block).__name__} {reason}.")
    spec = find_by_class(BLOCK_SPECS, block, stack=stack)
    if spec is None:
        raise ValueError(
            f"Expected blocks that routing knows, got {type(block).__name__} in {type(model).__name__}. Tell which of "
            f"its arguments belong to tokens: register_block_spec({type(block).__name__!r}, BlockSpec(...)), then run "
            "check_token_routing."
        )
    return spec


def _wrap(block: torch.nn.Module, spec: BlockSpec, shared: RoutedModel, route_index: int | None) -> BlockForward:
    names = _argument_names(block)
    missing = sorted(spec.argument_names - set(names))
    if missing:
        raise ValueError(
            f"Expected {type(block).__name__}.forward to take {missing}, as its spec says, but it takes "
            f"{list(names)}. Correct the spec with register_block_spec."
        )
    return BlockForward(block, spec=spec, shared=shared, route_index=route_index, argument_names=names)


def _argument_names(module: torch.nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def model_forward(model: torch.nn.Module) -> ModelForward:
    """The model's forward as set by `apply_token_routing`; raises ValueError if it was not called."""
    forward = model.__dict__.get("_token_routing")
    if forward is None:
        raise ValueError(f"Expected a model with apply_token_routing, got {type(model).__name__} without.")
    return forward
