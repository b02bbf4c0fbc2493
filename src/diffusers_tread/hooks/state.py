# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The state of one forward of a routed model, and the state that the model's wrappers share.

Shapes: B batch, L tokens of a block's stream, N routable tokens among them, K kept tokens, D width.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..routing import RoutingCall, TokenRouter, take_tokens
from ..routing.rows import check_grid, tokens_of_rows
from .specs import Window


@dataclass(frozen=True, eq=False)
class Probe:
    """Makes blocks run on all tokens in another order instead of a subset, for `check_token_routing`."""

    only: torch.nn.Module | None = None
    """The only block that does so; None for all routed blocks."""

    rolled: bool = False
    """Whether every other sample gets the lower half of its rows first, instead of a random token order in each."""


class _ThreadState(threading.local):
    """The forward that a thread is in; per thread, so it cannot be an attribute of the model."""

    def __init__(self):
        self.running: ForwardPass | None = None
        self.probe: Probe | None = None


class RoutedModel:
    """The state that the wrappers of one model share.

    Args:
        model: The model.
        router: Its router.

    Attributes:
        thread: The state of this thread's forward.
        passes: A block's input to the forward that it is from, for recomputation in a checkpoint of other code.
    """

    def __init__(self, model: torch.nn.Module, router: TokenRouter):
        self.model = model
        self.router = router
        self.thread = _ThreadState()
        self.passes = WeakTensorKeyDictionary()

    def is_routing(self, call: RoutingCall | None = None) -> bool:
        """Whether a forward with this call would take a route in this thread."""
        return self.thread.probe is not None or self.router.is_routing(self.model.training, call)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "router": self.router}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class ForwardPass:
    """The state that blocks share in one forward: mode, seed and, from the first routed block on, the kept tokens.

    Args:
        router: The model's router.
        training: The model's mode.
        call: The forward's `routing`.
        seed: From `TokenRouter.forward_seed`, or None for a dense forward. Not drawn in a block, because the
            recomputation of a checkpointed block must not draw again.
        window: Position of the routable tokens in the stream, if the model's arguments determine it.
        grid: (h, w) or (F, h, w) of the routable tokens, for routes of rows.
        probe: Keeps all tokens in another order; None for real routing.
    """

    def __init__(
        self,
        router: TokenRouter,
        *,
        training: bool,
        call: RoutingCall | None,
        seed: torch.Tensor | None,
        window: Window | None,
        grid: tuple[int, ...] | None = None,
        probe: Probe | None = None,
    ):
        self.router = router
        self.training = training
        self.call = call
        self.seed = seed
        self.window = window
        self.grid = grid
        self.probe = probe
        self.has_same_subsets = router.has_same_subsets(call)
        self.grad_enabled = torch.is_grad_enabled()
        self.num_image_tokens: int | None = None
        self.num_routable: int | None = None
        self.kept_token_ids: list[torch.Tensor | None] | None = None
        self.stream_ids: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def kept_tokens(self, hidden_states: torch.Tensor, route_index: int, window: Window) -> torch.Tensor | None:
        """[B, K] ids within the window for one route, or None if it keeps all tokens; planned at the first call."""
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
        if self.probe is not None:
            order = self._rolled_rows(tokens) if self.probe.rolled else self._random_order(tokens)
            return [order] * num_routes
        plan = self.router.plan(tokens, training=self.training, call=self.call, seed=self.seed, grid_size=self.grid)
        return [None] * num_routes if plan is None else plan

    def _random_order(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N] ids, a random order of all tokens."""
        batch_size, num_tokens = tokens.shape[:2]
        rows = 1 if self.has_same_subsets else batch_size
        order = torch.rand(rows, num_tokens, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
        return order.to(tokens.device).expand(batch_size, -1)

    def _rolled_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N] ids, with the lower half of the rows first in every other sample."""
        grid = check_grid(self.grid, tokens.shape[1])
        rows = torch.arange(grid[1], device=tokens.device).repeat(tokens.shape[0], 1)
        step = 1 if self.has_same_subsets else 2
        rows[::step] = rows[::step].roll(grid[1] // 2, dims=1)
        return tokens_of_rows(rows, grid)

    def ids_in_stream(self, kept: torch.Tensor, window: Window, length: int, route_index: int) -> torch.Tensor:
        """[B, L - N + K]: positions kept in a stream of `length` tokens, including all those outside the window."""
        key = (route_index, length, window.start if isinstance(window.start, int) else None)
        ids = self.stream_ids.get(key)
        if ids is None:
            ids = self.stream_ids[key] = _ids_in_stream(kept, window, length)
        return ids


def _window_tokens(hidden_states: torch.Tensor, window: Window) -> torch.Tensor:
    """[B, N, D]: the routable tokens, whose magnitude may affect which are kept."""
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
