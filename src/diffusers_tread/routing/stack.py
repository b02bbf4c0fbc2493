# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs a stack of blocks, some of which the routed tokens skip.

Shapes: B batch, N tokens, K kept tokens, D width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .ops import out_of_range, put_tokens, take_tokens
from .route import TokenRoute


class StackOutput(NamedTuple):
    """What a forward of `RoutedStack` returns."""

    tokens: torch.Tensor
    """[B, N, D] after the last block."""

    prefix: torch.Tensor | None
    """The tokens before the first route's first block, [B, N, D], if they were given or requested. Further channels, D
    each, hold the first block's extra output, if any, and the earlier states that routes rejoin with
    (`TokenRoute.rejoin_from`)."""

    hidden_states: dict[int, torch.Tensor]
    """The tokens after each requested block: [B, N, D], or the kept ones, [B, K, D], inside a route that was taken."""


class RoutedStack(nn.ModuleList):
    """The blocks of a denoiser and the one place where their tokens are routed.

    Kept tokens are gathered once before a route's first block and put back once after its last, so the blocks know
    nothing of routing and run on a shorter sequence. Each earlier state that a route rejoins with
    (`TokenRoute.rejoin_from`), [B, N, D], is held until the forward ends, if the route is taken or the prefix is
    requested. This costs no memory in training, where the backward keeps the block's input anyway.

    Args:
        blocks: Called as `block(tokens, *shared, *per_token)`, [B, N, D] to [B, N, D] for any N.
    """

    def forward(
        self,
        tokens: torch.Tensor,
        *shared: Any,
        routes: Sequence[TokenRoute] = (),
        kept_token_ids: list[torch.Tensor | None] | None = None,
        fusions: Mapping[str, torch.nn.Module] | None = None,
        path_drops: "list[torch.Tensor | bool] | None" = None,
        per_token: Sequence[torch.Tensor | None] = (),
        prefix: torch.Tensor | None = None,
        return_prefix: bool = False,
        hidden_states_at: Iterable[int] = (),
        checkpoint: Callable[..., Any] | None = None,
    ) -> StackOutput:
        """Runs the blocks.

        Args:
            tokens: [B, N, D].
            shared: Arguments that every block gets unchanged, such as the conditioning.
            routes: The model's routes, `TokenRouter.routes`.
            kept_token_ids: The plan: per route [B, K] int64, or None for a route not taken; None for a dense forward.
            fusions: The `RouteFusion` of each route with `rejoin="fuse"`, by route index, as from `make_fusions`.
            path_drops: Per route which samples skip its blocks, from `TokenRouter.plan_drops`.
            per_token: Arguments with an entry for each token, [B, N, ...] or [1, N, ...], such as rotary tables:
                inside a route a block gets the entries of its kept tokens. None is passed on as None, except in last
                place: there it means that blocks return `(tokens, made)`, and the `made` of the first block,
                [B, N, D], becomes the last argument of the others. Then no route may begin at the first block.
            prefix: The prefix from another forward with the same inputs; the blocks before it are not run again.
            return_prefix: Whether to return the prefix.
            hidden_states_at: Indices of blocks, 0-based, whose output to return as well.
            checkpoint: Gradient checkpointing, called as `checkpoint(block, *arguments)`.

        Raises:
            ValueError: `kept_token_ids` or `prefix` does not fit the routes and the tokens; a prefix without routes; a
                route without its fusion; the index of a block that does not exist or is not run.
        """
        # What is requested, and the routes taken.
        wanted, per_token = set(hidden_states_at), list(per_token)
        makes = bool(per_token) and per_token[-1] is None
        in_prefix = _states_in_prefix(routes)
        num_parts = 1 + makes + len(in_prefix)
        self._check(tokens, routes, kept_token_ids, prefix, return_prefix, num_parts)
        starts = {one.route.start: one for one in _taken_routes(routes, kept_token_ids, fusions or {}, path_drops)}
        self._check_wanted(wanted, 0 if prefix is None else routes[0].start, starts.values())
        prefix_end = routes[0].start if prefix is not None or return_prefix else -1
        held_at = {one.route.rejoin_from for one in starts.values()} | set(in_prefix if return_prefix else ())

        # The blocks.
        states, arguments, hidden_states, taken = {0: tokens}, per_token, {}, None  # states before blocks: B N D
        for index, block in enumerate(self):
            # The prefix: made here, or taken from another forward.
            if prefix is not None and index < prefix_end:
                continue
            if index == prefix_end and prefix is None:
                made = [per_token[-1]] if makes else []
                parts = [tokens, *made, *(states[earlier] for earlier in in_prefix)]
                prefix = torch.cat(parts, dim=2) if num_parts > 1 else tokens
            elif index == prefix_end:
                tokens, *parts = (part.contiguous() for part in prefix.chunk(num_parts, dim=2))
                if makes:
                    per_token[-1] = parts.pop(0)
                states.update(zip(in_prefix, parts, strict=True))
            if index in held_at:
                states[index] = tokens

            # A route begins: only the kept tokens go on.
            if index in starts:
                taken = starts[index]
                rejoining = _rejoining_tokens(taken.route, states, tokens)  # B N D
                if taken.ids is not None:
                    tokens = take_tokens(tokens, taken.ids)  # B K D
                    arguments = [_take_each(one, taken.ids) for one in per_token]

            # The block.
            if taken is None or taken.is_run:
                run = block if checkpoint is None else partial(checkpoint, block)
                tokens = run(tokens, *shared, *arguments)
            if isinstance(tokens, tuple):
                tokens, made = tokens
                per_token[-1] = made if per_token[-1] is None else per_token[-1]
            if index in wanted:
                hidden_states[index] = tokens

            # The route ends: the other tokens rejoin.
            if taken is not None and index == taken.route.end:
                tokens, arguments, taken = taken.rejoin(rejoining, tokens, checkpoint), per_token, None  # B N D
        return StackOutput(tokens, prefix, hidden_states)

    def _check(
        self,
        tokens: torch.Tensor,
        routes: Sequence[TokenRoute],
        kept_token_ids: list[torch.Tensor | None] | None,
        prefix: torch.Tensor | None,
        return_prefix: bool,
        num_parts: int,
    ) -> None:
        """Raises ValueError for arguments that do not fit; never waits for an accelerator."""
        # The kept tokens.
        if kept_token_ids is not None:
            # Not `len(tokens)`, with which `torch.export` would fix the batch size.
            batch_size, num_tokens = tokens.shape[:2]
            fits = [
                isinstance(ids, torch.Tensor)
                and (ids.dtype == torch.int64 and ids.dim() == 2)
                and (ids.shape[0] == batch_size and 1 <= ids.shape[1] <= num_tokens)
                for ids in kept_token_ids
                if ids is not None
            ]
            if len(kept_token_ids) != len(routes) or not all(fits):
                raise ValueError(
                    f"Expected int64 kept_token_ids of shape [{batch_size}, K <= {num_tokens}], or None, for each of "
                    f"the {len(routes)} routes, got {[_describe_ids(ids) for ids in kept_token_ids]}."
                )
            for index, ids in enumerate(kept_token_ids):
                if ids is not None:
                    _check_ids(ids, num_tokens=num_tokens, route_index=index)

        # The prefix.
        if (prefix is not None or return_prefix) and not routes:
            raise ValueError("Expected a model with routes for a prefix, got routes=None. Leave the prefix out.")
        shape = (*tokens.shape[:2], tokens.shape[2] * num_parts)
        if prefix is not None and prefix.shape != shape:
            raise ValueError(
                f"Expected a prefix {list(shape)}, as return_prefix=True gave it for these inputs, got "
                f"{list(prefix.shape)}."
            )

    def _check_wanted(self, wanted: set[int], first: int, taken: Iterable["_TakenRoute"]) -> None:
        left_out = [range(one.route.start, one.route.end + 1) for one in taken if not one.is_run]
        if wrong := sorted(wanted - set(range(first, len(self))).difference(*left_out)):
            raise ValueError(
                f"Expected indices of blocks that run, {first} to {len(self) - 1} but for a path that is dropped, got "
                f"{wrong}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _TakenRoute:
    """A route that has an effect in this forward."""

    route: TokenRoute
    ids: torch.Tensor | None
    """[B, K] int64, the kept tokens; None for all."""
    fusion: torch.nn.Module | None
    drop: "torch.Tensor | bool" = False
    """Which samples skip the blocks, from `TokenRouter.plan_drops`."""

    @property
    def is_run(self) -> bool:
        return self.drop is not True

    def rejoin(
        self, rejoining: torch.Tensor, tokens: torch.Tensor, checkpoint: Callable[..., Any] | None
    ) -> torch.Tensor:
        """[B, N, D] after the route, from the rejoining states, [B, N, D], and the last block's output, [B, K, D]."""
        if self.fusion is None:
            return put_tokens(rejoining, self.ids, tokens)
        fuse = self.fusion if checkpoint is None else partial(checkpoint, self.fusion)
        is_dropped = self.drop if isinstance(self.drop, torch.Tensor) else None
        return fuse(rejoining, tokens if self.is_run else None, self.ids, is_dropped)


def _taken_routes(
    routes: Sequence[TokenRoute],
    kept_token_ids: list[torch.Tensor | None] | None,
    fusions: Mapping[str, torch.nn.Module],
    path_drops: "list[torch.Tensor | bool] | None",
) -> list[_TakenRoute]:
    """The routes with tokens to route away, and those with a fusion, which runs in dense forwards too."""
    taken = []
    for index, route in enumerate(routes):
        ids = None if kept_token_ids is None else kept_token_ids[index]
        if route.rejoin != "fuse" and ids is not None:
            taken.append(_TakenRoute(route=route, ids=ids, fusion=None))
        elif route.rejoin == "fuse":
            if str(index) not in fusions:
                raise ValueError(f"Expected fusions with a RouteFusion for route {index}, got {list(fusions)}.")
            drop = False if path_drops is None else path_drops[index]
            taken.append(_TakenRoute(route=route, ids=ids, fusion=fusions[str(index)], drop=drop))
    return taken


def _describe_ids(ids: Any) -> str:
    return f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__


def _check_ids(ids: torch.Tensor, *, num_tokens: int, route_index: int) -> None:
    """Raises ValueError for ids out of range, which would silently take tokens of another sample."""
    if wrong := out_of_range(ids, num_tokens):
        raise ValueError(
            f"Expected kept_token_ids in [0, {num_tokens}), got {wrong[:10]} for route {route_index}. Ids count the "
            "tokens of one sample."
        )


def _take_each(argument: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor | None:
    """The entries of an argument [B or 1, N, ...] that belong to each sample's kept tokens: [B, K, ...]."""
    return None if argument is None else take_tokens(argument.expand(ids.shape[0], *argument.shape[1:]), ids)


def _states_in_prefix(routes: Sequence[TokenRoute]) -> list[int]:
    """Blocks before the first route whose input a route rejoins with, except block 0, whose input is always known."""
    return sorted({route.rejoin_from for route in routes if 0 < (route.rejoin_from or 0) < routes[0].start})


def _rejoining_tokens(route: TokenRoute, states: dict[int, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """[B, N, D]: the state that routed tokens return with (`TokenRoute.rejoin`, `rejoin_from`), or, with a fusion, the
    first of its two states for all tokens."""
    if route.rejoin_from is not None:
        return states[route.rejoin_from]
    if route.rejoin == "input":
        return states[0]
    return states[0] + tokens if route.rejoin == "sum" else tokens
