# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The wrapper around a block: gather the kept tokens, run the block on them, put them back.

Shapes: B batch, L tokens of the block's stream, K kept tokens, D width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..routing import put_tokens, take_tokens
from .per_sample_table import PerSampleTable
from .specs import Axis, BlockSpec, Window
from .state import ForwardPass, RoutedModel


class BlockForward:
    """Set as the `forward` of a block: gathers the kept tokens, runs the block on them, puts them back.

    Args:
        block: The block.
        spec: The block's spec.
        shared: The state shared by the model's wrappers, with the running forward.
        route_index: Index of the block's route; with None the wrapper only records the number of image tokens.
        argument_names: The names of the block's arguments, in order.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        *,
        spec: BlockSpec,
        shared: RoutedModel,
        route_index: int | None,
        argument_names: tuple[str, ...],
    ):
        self.module = block
        self.spec = spec
        self.shared = shared
        self.route_index = route_index
        self.positions = {name: index for index, name in enumerate(argument_names)}
        self.gathers = [gather for gather in spec.gathers if gather[0] in self.positions]
        # The function, because `type(block).forward` cannot be traced for classes that diffusers allows in graphs.
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
        """Calls `run` on the kept tokens. `inside`: this may be the recomputation in a checkpoint of other code."""
        # Dense forwards, and blocks without a route.
        if running is None or running.seed is None:
            return run(*args, **kwargs)
        hidden_states = self._argument(args, kwargs, self.spec.hidden)
        if hidden_states is None:  # the stream is absent, as in Kandinsky 6 with audio alone
            return run(*args, **kwargs)
        if self.spec.sequence_first:
            hidden_states = hidden_states.transpose(0, 1)
        window = self._window(running, hidden_states, args, kwargs)
        if self.route_index is None or not self._is_probed(running):
            return run(*args, **kwargs)

        # Checks.
        self._refuse_positions(args, kwargs)
        if inside and running.grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self.module).__name__} runs without gradients inside a forward with gradients: a re-entrant "
                "checkpoint, whose recomputation would not know which tokens were kept. Use use_reentrant=False or "
                "model.enable_gradient_checkpointing()."
            )

        # The kept tokens.
        kept = running.kept_tokens(hidden_states, self.route_index, window)
        if kept is None:
            return run(*args, **kwargs)
        args, kwargs, ids = self._gather(running, kept, window, hidden_states, args, kwargs)
        return self._put(hidden_states, ids, run(*args, **kwargs))

    def _is_probed(self, running: ForwardPass) -> bool:
        """Whether this block routes, in a forward that may probe only another block."""
        return running.probe is None or running.probe.only in (None, self.module)

    def _gather(
        self,
        running: ForwardPass,
        kept: torch.Tensor,
        window: Window,
        hidden_states: torch.Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any], torch.Tensor]:
        """The arguments for the kept tokens only, and the ids of these in the stream of `hidden_states`."""
        # Whether one subset serves all samples.
        spec, (batch_size, stream_length) = self.spec, hidden_states.shape[:2]
        image_length = window.length if spec.joint else stream_length
        same_rows = batch_size == 1 or running.has_same_subsets
        if spec.needs_shared_subset and not same_rows:
            raise ValueError(
                f"Expected one subset for all samples, which {type(self.module).__name__} needs because it uses a "
                "per-token argument without a batch axis as an index. Give shared_subset=True, and neither a "
                "magnitude_mix nor a force_keep per sample."
            )

        # The ids in an array of another length, which may cover text or only the image.
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

        # Per-token arguments.
        arguments, kwargs = list(args), dict(kwargs)
        for name, path, axes in self.gathers:
            value = self._argument(arguments, kwargs, name)
            if value is not None:
                gather = partial(
                    _gather_leaf,
                    axes=axes,
                    ids_for=ids_for,
                    batch_size=batch_size,
                    same_rows=same_rows,
                    sequence_first=spec.sequence_first,
                )
                self._replace(arguments, kwargs, name, map_leaves(value, path, gather))

        # The number of rows.
        if spec.num_rows is not None:
            name, *path = spec.num_rows.split(".")
            num_rows = self._argument(arguments, kwargs, name)
            num_kept = map_leaves(num_rows, tuple(path), lambda rows: rows * kept.shape[1] // window.length)
            self._replace(arguments, kwargs, name, num_kept)

        # The tokens.
        ids: Any = ids_for(stream_length)  # never None for the block's own stream
        short = take_tokens(hidden_states, ids)
        self._replace(arguments, kwargs, spec.hidden, short.transpose(0, 1) if spec.sequence_first else short)
        return tuple(arguments), kwargs, ids

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
        """Position of the routable tokens in this block's stream."""
        # As the model's arguments say, or from the number of image tokens, or the whole stream.
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

        # Without conditions at the start.
        if spec.keep_first is not None:
            num_first = self._argument(args, kwargs, spec.keep_first)
            start, num_tokens = start + num_first, num_tokens - num_first
        return Window(start, num_tokens)

    def _refuse_positions(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises ValueError if this call addresses tokens by their position."""
        spec, name_of_block = self.spec, type(self.module).__name__
        for name in spec.must_be_none:
            if self._argument(args, kwargs, name) is not None:
                raise ValueError(
                    f"Expected `{name}` of {name_of_block} to be None in a routed forward: it addresses tokens by "
                    "their position. Leave it out, or switch routing off for this call."
                )
        reason = None if spec.objection is None else spec.objection(self.module, partial(self._argument, args, kwargs))
        if reason is not None:
            raise ValueError(f"Expected a {name_of_block} that can be routed, but {reason}.")

    def _find_pass(self, args: tuple, kwargs: dict[str, Any]) -> ForwardPass | None:
        """The running forward; in a checkpoint's recomputation, the forward that the block's input is from."""
        # In a forward.
        running = self.shared.thread.running
        if torch.compiler.is_compiling():  # a traced checkpoint replays the graph and does not call the block again
            return running
        hidden_states = self._argument(args, kwargs, self.spec.hidden)
        if running is not None:
            if running.grad_enabled and hidden_states is not None:
                self.shared.passes[hidden_states] = running
            return running

        # In a recomputation.
        if hidden_states is not None and torch.is_grad_enabled():
            running = self.shared.passes.get(hidden_states)
        if running is None and self.route_index is not None and self.shared.is_routing():
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


def _gather_leaf(
    value: Any,
    *,
    axes: Axis,
    ids_for: Callable[[int], torch.Tensor | None],
    batch_size: int,
    same_rows: bool,
    sequence_first: bool,
) -> Any:
    """The kept tokens' entries of `value` along each of `axes`; axis 0 means that `value` has no batch axis."""
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


def map_leaves(value: Any, path: tuple[str, ...], function: Callable[[Any], Any]) -> Any:
    """Applies `function` to all leaves of nested tuples, lists and dicts below `path`; the containers are copied."""
    # Along the path.
    if path and isinstance(value, dict):
        if path[0] not in value:
            return value
        return {**value, path[0]: map_leaves(value[path[0]], path[1:], function)}
    if path and isinstance(value, (tuple, list)):
        index = int(path[0])
        changed = [map_leaves(x, path[1:], function) if i == index else x for i, x in enumerate(value)]
        return type(value)(changed)

    # Below it.
    if isinstance(value, (tuple, list)):
        return type(value)([map_leaves(x, (), function) for x in value])
    if isinstance(value, dict):
        return {key: map_leaves(x, (), function) for key, x in value.items()}
    return function(value)
