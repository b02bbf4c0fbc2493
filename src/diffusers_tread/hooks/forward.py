# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The wrappers around a model, its blocks and its checkpoint function.

Each wrapper is an object set as its module's `forward`. It holds its module and finds everything else through it, so a
deepcopy (EMA) or a pickle of the model carries routing of its own. diffusers' HookRegistry does neither.

Shapes: B batch, L tokens of a block's stream, N routable tokens among them, K kept tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..routing import TokenRouter, put_tokens, take_tokens
from .block_specs import Axis, BlockSpec, ModelSpec, Window
from .tables import PerSampleTable


_MARK = "_token_routing_pass"


class ForwardPass:
    """What the blocks of one forward share: mode, seed, and the kept tokens once the first routed block needs them.

    Args:
        router: The model's router.
        training: The model's mode.
        seed: From `TokenRouter.forward_seed`, or None for a dense forward. Drawn here and not in a block, because the
            recomputation of a checkpointed block must not draw again.
        window: Where the routable tokens lie in the stream, if the model's arguments tell.
        permute: Keep all tokens, in random order: the probe of `check_token_routing`.
    """

    def __init__(
        self,
        router: TokenRouter,
        *,
        training: bool,
        seed: torch.Tensor | None,
        window: Window | None,
        permute: bool = False,
    ):
        self.router = router
        self.training = training
        self.seed = seed
        self.window = window
        self.permute = permute
        self.shared_subset = router.shared_subset
        self.grad_enabled = torch.is_grad_enabled()
        self.num_image_tokens: int | None = None
        self.num_routable: int | None = None
        self.kept_token_ids: list[torch.Tensor | None] | None = None
        self.stream_ids: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def kept_tokens(self, hidden_states: torch.Tensor, route_index: int, window: Window) -> torch.Tensor | None:
        """[B, K] ids within the window for one route, or None if the route keeps all; planned at the first call."""
        if self.kept_token_ids is None:
            tokens = _window_tokens(hidden_states, window)
            self.num_routable = window.length
            self.kept_token_ids = self._plan(tokens)
        if window.length != self.num_routable:
            raise ValueError(
                f"Expected the same number of routable tokens in all routed blocks, got {self.num_routable} and then "
                f"{window.length}. Route one stack only: apply_token_routing(..., stack=...)."
            )
        return self.kept_token_ids[route_index]

    def _plan(self, tokens: torch.Tensor) -> list[torch.Tensor | None]:
        num_routes = len(self.router.routes)
        if self.permute:
            batch_size, num_tokens = tokens.shape[:2]
            rows = 1 if self.shared_subset else batch_size
            order = torch.rand(rows, num_tokens, device=tokens.device).argsort(dim=1).expand(batch_size, -1)  # B N
            return [order] * num_routes
        plan = self.router.plan(tokens, training=self.training, seed=self.seed)
        return [None] * num_routes if plan is None else plan

    def ids_in_stream(self, kept: torch.Tensor, window: Window, length: int, route_index: int) -> torch.Tensor:
        """[B, L - N + K]: positions that a stream of `length` tokens keeps, all outside the window among them."""
        key = (route_index, length, window.start if isinstance(window.start, int) else None)
        ids = self.stream_ids.get(key)
        if ids is None:
            ids = self.stream_ids[key] = _ids_in_stream(kept, window, length)
        return ids


class BlockForward:
    """Set as the `forward` of a block: gathers the kept tokens, runs the block on them, puts them back.

    Args:
        block: The block.
        spec: How it is called.
        routing: The model's `ModelForward`, which knows the running forward.
        route_index: Which route the block belongs to; None only notes the number of image tokens.
        argument_names: The names of the block's arguments, in order.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        *,
        spec: BlockSpec,
        routing: "ModelForward",
        route_index: int | None,
        argument_names: tuple[str, ...],
    ):
        self.module = block
        self.spec = spec
        self.routing = routing
        self.route_index = route_index
        self.positions = {name: index for index, name in enumerate(argument_names)}
        self.gathers = [gather for gather in spec.gathers if gather[0] in self.positions]
        # The function itself: `type(block).forward` cannot be traced for classes that diffusers allows in graphs.
        self.function = type(block).forward
        self.before = block.__dict__.get("forward")
        self.compiled: Callable | None = None

    def __call__(self, *args: Any, token_routing_done: bool = False, **kwargs: Any) -> Any:
        if token_routing_done:
            return self.run_block(*args, **kwargs)
        return self.route(self._find_pass(args, kwargs), self.run_block, args, kwargs, inside=True)

    def run_block(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None:
            return self.compiled(self.module, *args, **kwargs)
        if self.before is not None:
            return self.before(*args, **kwargs)
        return self.function(self.module, *args, **kwargs)

    def route(
        self, running: ForwardPass | None, run: Callable, args: tuple, kwargs: dict[str, Any], *, inside: bool
    ) -> Any:
        """Calls `run` on the kept tokens. `inside`: a foreign checkpoint may have put us inside its recomputation."""
        if running is None or running.seed is None:
            return run(*args, **kwargs)
        hidden_states = self._argument(args, kwargs, self.spec.hidden)
        if hidden_states is None:  # an absent stream, such as Kandinsky 6 with audio alone
            return run(*args, **kwargs)
        if self.spec.sequence_first:
            hidden_states = hidden_states.transpose(0, 1)
        window = self._window(running, hidden_states, args, kwargs)
        if self.route_index is None:
            return run(*args, **kwargs)
        if inside and running.grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self.module).__name__} runs without gradients inside a forward with gradients: a re-entrant "
                "checkpoint, whose recomputation would not know which tokens were kept. Use use_reentrant=False or "
                "model.enable_gradient_checkpointing()."
            )
        kept = running.kept_tokens(hidden_states, self.route_index, window)
        if kept is None:
            return run(*args, **kwargs)

        args, kwargs, ids = self._gather(running, kept, window, hidden_states, args, kwargs)
        return self._put(hidden_states, ids, run(*args, **kwargs))

    def _gather(
        self,
        running: ForwardPass,
        kept: torch.Tensor,
        window: Window,
        hidden_states: torch.Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any], torch.Tensor]:
        """The call with the kept tokens only, and their ids in the stream of `hidden_states`."""
        spec, (batch_size, stream_length) = self.spec, hidden_states.shape[:2]
        image_length = window.length if spec.joint else stream_length
        same_rows = batch_size == 1 or running.shared_subset
        if spec.needs_shared_subset and not same_rows:
            raise ValueError(
                f"Expected one subset for all samples, which {type(self.module).__name__} needs because it uses a "
                "per-token argument without a batch axis as an index. Set router.shared_subset = True."
            )

        def ids_for(length: int) -> torch.Tensor | None:
            shifted = window
            if length != stream_length:
                if length == 1:
                    return None
                if length != image_length and (spec.text is None or length < image_length):
                    raise ValueError(self._length_message(length, stream_length))
                start = window.start if not spec.joint else 0
                shifted = Window(start + (length - image_length if spec.text == "first" else 0), window.length)
            return running.ids_in_stream(kept, shifted, length, self.route_index)

        args, kwargs = list(args), dict(kwargs)
        for name, path, axes in self.gathers:
            value = self._argument(args, kwargs, name)
            if value is not None:
                gather = partial(
                    _gather_leaf,
                    axes=axes,
                    ids_for=ids_for,
                    batch_size=batch_size,
                    same_rows=same_rows,
                    sequence_first=spec.sequence_first,
                )
                self._replace(args, kwargs, name, _map_leaves(value, path, gather))
        ids = ids_for(stream_length)
        short = take_tokens(hidden_states, ids)
        self._replace(args, kwargs, spec.hidden, short.transpose(0, 1) if spec.sequence_first else short)
        return tuple(args), kwargs, ids

    def _put(self, hidden_states: torch.Tensor, ids: torch.Tensor, output: Any) -> Any:
        is_tuple = isinstance(output, (tuple, list))
        short = output[self.spec.output] if is_tuple else output
        if self.spec.sequence_first:
            full = put_tokens(hidden_states, ids, short.transpose(0, 1)).transpose(0, 1)
        else:
            full = put_tokens(hidden_states, ids, short)
        if not is_tuple:
            return full
        return (*output[: self.spec.output], full, *output[self.spec.output + 1 :])

    def _window(self, running: ForwardPass, hidden_states: torch.Tensor, args: tuple, kwargs: dict) -> Window:
        """Where the routable tokens lie in this block's stream."""
        spec, length = self.spec, hidden_states.shape[1]
        if not spec.joint:
            running.num_image_tokens = length
        if running.window is not None:
            start, num_tokens = running.window.start, running.window.length
            if spec.window_mask is not None:
                mask = self._argument(args, kwargs, spec.window_mask)
                start = mask.argmax(dim=1)  # B
            elif isinstance(start, int) and start < 0:
                start = start + length
        elif spec.joint:
            num_tokens = running.num_image_tokens
            if num_tokens is None:
                raise ValueError(
                    f"{type(self.module).__name__} mixes text and image tokens, and nothing says how many are image "
                    "tokens. Register the model: register_model_spec(name, ModelSpec(window=...))."
                )
            start = length - num_tokens if spec.text == "first" else 0
        else:
            start, num_tokens = 0, length
        if spec.keep_first is not None:
            num_first = self._argument(args, kwargs, spec.keep_first)
            start, num_tokens = start + num_first, num_tokens - num_first
        for name in spec.must_be_none:
            if self._argument(args, kwargs, name) is not None:
                raise ValueError(
                    f"Expected `{name}` of {type(self.module).__name__} to be None in a routed forward: it addresses "
                    "tokens by their position. Leave it out, or switch routing off for this call."
                )
        return Window(start, num_tokens)

    def _find_pass(self, args: tuple, kwargs: dict[str, Any]) -> ForwardPass | None:
        """The running forward; in a checkpoint's recomputation the one that the block's input was marked with."""
        running = self.routing.running
        if torch.compiler.is_compiling():  # a traced checkpoint replays the graph, it does not call the block again
            return running
        hidden_states = self._argument(args, kwargs, self.spec.hidden)
        if running is not None:
            if running.grad_enabled and hidden_states is not None:
                setattr(hidden_states, _MARK, running)
            return running
        running = getattr(hidden_states, _MARK, None)
        if running is None and self.route_index is not None and self.routing.is_routing():
            raise RuntimeError(
                f"{type(self.module).__name__} was called outside a forward of its model, so it is not known which "
                "tokens are kept. If this is a checkpoint's recomputation, use use_reentrant=False without offloading "
                "the block's input, or model.enable_gradient_checkpointing(). To call a block by itself, switch "
                "routing off: token_routing(model, enabled=False)."
            )
        return running

    def _argument(self, args: "tuple | list", kwargs: dict[str, Any], name: str) -> Any:
        position = self.positions[name]
        return args[position] if position < len(args) else kwargs.get(name)

    def _replace(self, args: list, kwargs: dict[str, Any], name: str, value: Any) -> None:
        position = self.positions[name]
        if position < len(args):
            args[position] = value
        else:
            kwargs[name] = value

    def _length_message(self, length: int, stream_length: int) -> str:
        return (
            f"Expected per-token arguments of {type(self.module).__name__} with {stream_length} entries, got one with "
            f"{length}. Correct its spec with register_block_spec."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}  # compiled code is neither copied nor pickled


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
        seed = self.router.forward_seed(_first_tensor(arguments.values()).device)
        return ForwardPass(self.router, training=training, seed=seed, window=window, permute=self.permute)

    @property
    def __func__(self) -> Callable:
        # accelerate's `prepare` wraps `model.forward.__func__`, and its `unwrap_model` binds what it finds underneath
        # to the model again; without this it would bind this object, which is bound already.
        return forward_of_model

    @property
    def __signature__(self):
        from inspect import signature  # pipelines and trainers look at a model's signature, never in a forward

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


def _window_tokens(hidden_states: torch.Tensor, window: Window) -> torch.Tensor:
    """[B, N, D]: the routable tokens, whose magnitude may count in the choice."""
    if isinstance(window.start, int):
        return hidden_states[:, window.start : window.start + window.length]
    positions = torch.arange(window.length, device=hidden_states.device)
    return take_tokens(hidden_states, window.start.unsqueeze(1) + positions)


def _ids_in_stream(kept: torch.Tensor, window: Window, length: int) -> torch.Tensor:
    if window.length == length:
        return kept
    batch_size = kept.shape[0]
    if isinstance(window.start, int):
        before = torch.arange(window.start, device=kept.device).expand(batch_size, -1)
        after = torch.arange(window.start + window.length, length, device=kept.device).expand(batch_size, -1)
        return torch.cat([before, kept + window.start, after], dim=1)
    start = window.start.unsqueeze(1)  # B 1
    others = torch.arange(length - window.length, device=kept.device).expand(batch_size, -1)
    others = others + window.length * (others >= start)
    return torch.cat([others, kept + start], dim=1)


def _gather_leaf(
    value: Any,
    *,
    axes: Axis,
    ids_for: Callable[[int], torch.Tensor | None],
    batch_size: int,
    same_rows: bool,
    sequence_first: bool,
) -> Any:
    """The entries of the kept tokens along each of `axes`; axis 0 means that `value` has no batch axis."""
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(axes, Mapping):
        axes = axes.get(value.ndim, ())
    for axis in (axes,) if isinstance(axes, int) else axes:
        ids = ids_for(value.shape[axis])
        if ids is None:
            continue
        if sequence_first and axis == 0:
            value = take_tokens(value.transpose(0, 1), ids).transpose(0, 1)
        elif axis == 0:
            value = value.index_select(0, ids[0]) if same_rows else PerSampleTable(value[ids])
        else:
            if value.shape[0] not in (1, batch_size):
                raise ValueError(
                    f"Expected {batch_size} samples (or 1) in a per-token argument, got {value.shape[0]}."
                )
            moved = value.expand(batch_size, *value.shape[1:]).movedim(axis, 1)
            value = take_tokens(moved, ids).movedim(1, axis)
    return value


def _map_leaves(value: Any, path: tuple[str, ...], function: Callable[[Any], Any]) -> Any:
    """`function` of all leaves of nested tuples, lists and dicts below `path`; the containers are copied."""
    if path and isinstance(value, dict):
        if path[0] not in value:
            return value
        return {**value, path[0]: _map_leaves(value[path[0]], path[1:], function)}
    if path and isinstance(value, (tuple, list)):
        index = int(path[0])
        changed = [_map_leaves(x, path[1:], function) if i == index else x for i, x in enumerate(value)]
        return type(value)(changed)
    if isinstance(value, (tuple, list)):
        return type(value)([_map_leaves(x, (), function) for x in value])
    if isinstance(value, dict):
        return {key: _map_leaves(x, (), function) for key, x in value.items()}
    return function(value)


def _first_tensor(values: Any) -> torch.Tensor:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, (list, tuple)):
            found = _first_tensor(value)
            if found is not None:
                return found
    return None
