# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Whether a denoiser routes, how much, and which tokens are kept in one forward.

Shapes: B batch, N tokens, K kept tokens, D width.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..field_docs import with_field_docs
from .route import TokenRoute, check_magnitude_mix, check_selection_ratio, num_kept_tokens, resolve_routes
from .rows import check_grid, count_forced, rows_as_tokens, tokens_of_rows
from .subset import choose_samples, magnitude_priority, random_priority, select_kept_tokens, subset_hashes


@with_field_docs
@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingCall:
    """How one forward routes: the argument `routing` of a denoiser.

    A field that is None is unset: then an enclosing `token_routing` decides, then `TokenRouter.defaults`, then the
    default given with the field below.

    Raises:
        ValueError: A value outside its range.

    Example:
        >>> import torch
        >>> from diffusers_tread import RoutingCall, TREADTransformer2DModel
        >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8).eval()
        >>> latents, timestep = torch.randn(1, 4, 8, 8), torch.zeros(1)
        >>> weak = model(latents, timestep, routing=RoutingCall(selection_ratio=0.7, seed=0)).sample
    """

    enabled: bool | None = None
    """True or False switches routing on or off. Unset: on in training mode or with a `selection_ratio`, else off."""

    selection_ratio: float | None = None
    """Share of tokens routed away on every route, in [0, 1); 0.0 is dense. Unset: each route's own ratio."""

    seed: "int | torch.Tensor | None" = None
    """Makes the subset a pure function of (seed, route, sample, position). A 64-bit integer for the whole batch, or an
    int64 tensor [B] with one per sample, which makes a sample's subset independent of the batch around it. Unset: each
    forward draws a fresh one."""

    generator: torch.Generator | None = None
    """Source of fresh seeds. Unset: torch's default generator of the tokens' device. It is neither copied nor pickled
    with a model, and cannot be used inside a compiled forward: give a `seed` there."""

    shared_subset: bool | None = None
    """Whether all samples of the batch share one random draw. Unset: False. A [B, N] `force_keep` or a `magnitude_mix`
    still makes the samples' subsets differ."""

    force_keep: torch.Tensor | None = None
    """[N] or [B, N] bool, tokens that are never routed (text, padding, masked losses). If a sample forces more tokens
    than the ratio keeps, all samples keep that many. Routes of rows keep each row with such a token. A compiled
    forward recompiles for each new largest count per sample: give `kept_token_ids` there."""

    magnitude_mix: float | None = None
    """Overrides `TokenRoute.magnitude_mix` of every route, in [-1, 1]."""

    path_drop: bool | None = None
    """For routes with rejoin "fuse": True skips their blocks and replaces their output by the mask vector for all
    tokens, which is the weak branch of `PathDropGuidance`; False does so for no sample. Unset: in training mode each
    route does so for a share `TokenRoute.path_drop` of the samples, unless `enabled` is False."""

    def __post_init__(self):
        if self.enabled is not None and not isinstance(self.enabled, bool):
            raise ValueError(f"Expected enabled to be True, False or None, got {self.enabled!r}.")
        if self.selection_ratio is not None:
            check_selection_ratio(self.selection_ratio)
        if self.magnitude_mix is not None:
            check_magnitude_mix(self.magnitude_mix)
        if self.path_drop is not None and not isinstance(self.path_drop, bool):
            raise ValueError(f"Expected path_drop to be True, False or None, got {self.path_drop!r}.")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise ValueError(
                f"Expected a torch.Generator or None, got {self.generator!r}. For one generator per sample, use "
                "seed=draw_routing_seed(generators)."
            )

        # A tensor, because a compiled forward would recompile at each new Python int.
        seed = self.seed
        if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63:
            seed = torch.tensor(seed, dtype=torch.int64)
        is_seed = isinstance(seed, torch.Tensor) and seed.dtype == torch.int64 and seed.dim() <= 1
        if seed is not None and not is_seed:
            raise ValueError(f"Expected a 64-bit int or an int64 tensor [] or [B] as seed, got {_describe(seed)}.")
        object.__setattr__(self, "seed", seed)

        # The mask.
        mask = self.force_keep
        is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() in (1, 2)
        if mask is not None and not is_mask:
            raise ValueError(f"Expected a bool tensor [N] or [B, N] as force_keep, got {_describe(mask)}.")
        # Counted here, so that no forward has to wait for the device.
        object.__setattr__(self, "num_forced", None if mask is None else count_forced(mask))


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedCall(RoutingCall):
    """The settings of one forward: each field from the innermost layer that sets it; None if none does."""

    num_forced: dict[tuple[int, int], int] | None = None
    """The most rows with tokens of `force_keep` in a sample, by (frames, width) of each possible grid; for (1, 1) the
    most tokens."""

    def __post_init__(self):  # the fields were checked where they were set
        pass


class _Surroundings(threading.local):
    """The calls of the `token_routing` blocks that this thread is in, innermost first."""

    def __init__(self):
        self.calls: tuple[RoutingCall, ...] = ()


_FIELDS = [field.name for field in fields(ResolvedCall)]


class TokenRouter:
    """Holds the routes of one denoiser and plans each forward. It has no parameters, and no forward changes it.

    Args:
        routes: One `TokenRoute`, several, their mappings, or None for a model that never routes.
        num_layers: Number of blocks of the denoiser.

    Attributes:
        routes (`tuple[TokenRoute, ...]`): The routes with absolute indices, in the model's order.
        defaults (`RoutingCall`): Settings for all threads, used where neither the forward's `routing` nor
            `token_routing` sets a field. Assign another one to change them.

    Raises:
        ValueError: As `resolve_routes`.
    """

    __slots__ = ("num_layers", "routes", "defaults", "_surroundings")  # a misspelled setting is an error

    def __init__(self, routes: Any = None, *, num_layers: int):
        self.num_layers = num_layers
        self.routes = resolve_routes(routes, num_layers)
        self.defaults: RoutingCall = RoutingCall()
        self._surroundings = _Surroundings()

    def resolve(self, call: RoutingCall | None = None) -> ResolvedCall:
        """The settings of a forward with this call: each field from the call, then `token_routing`, then `defaults`.

        Raises:
            ValueError: As `check_path_drop`, if `path_drop` is True.
        """
        layers = (*(() if call is None else (call,)), *self._surroundings.calls, self.defaults)
        said = ResolvedCall(**{name: _first_said([getattr(one, name) for one in layers]) for name in _FIELDS})
        if said.path_drop:
            self.check_path_drop()
        return said

    def is_routing(self, training: bool, call: RoutingCall | None = None) -> bool:
        """Whether a forward with this mode and call takes any route."""
        said = self.resolve(call)
        asked = training or said.selection_ratio is not None if said.enabled is None else said.enabled
        return asked and any(_ratio(route, said) > 0.0 and not _skips(route, said) for route in self.routes)

    def is_dropping(self, training: bool, call: RoutingCall | None = None) -> bool:
        """Whether a forward with this mode and call drops the path of a random share of the samples."""
        said = self.resolve(call)
        asked = training and said.path_drop is None and said.enabled is not False
        return asked and any(route.path_drop > 0.0 for route in self.routes)

    def check_path_drop(self) -> None:
        """Raises ValueError unless the model has a route whose blocks can be skipped, one with rejoin "fuse"."""
        if not any(route.rejoin == "fuse" for route in self.routes):
            raise ValueError(
                f"Expected a route with rejoin='fuse', whose path can be dropped, got {list(self.routes)}. Use a "
                "denoiser of this package that was trained with one, or no path drop."
            )

    def has_same_subsets(self, call: RoutingCall | None = None) -> bool:
        """Whether all samples of a batch keep the same tokens, whatever the batch."""
        said = self.resolve(call)
        is_mixed = any(_magnitude_mix(route, said) != 0.0 for route in self.routes)
        return bool(said.shared_subset) and not is_mixed and (said.force_keep is None or said.force_keep.dim() == 1)

    def plan(
        self,
        hidden_states: torch.Tensor,
        *,
        training: bool,
        call: RoutingCall | None = None,
        seed: torch.Tensor | None = None,
        grid_size: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor | None] | None:
        """Chooses the kept tokens of one forward. Call it once per forward, outside any checkpointed block.

        Args:
            hidden_states: [B, N, D], the tokens that may be routed. Only shape and device are used; with
                `magnitude_mix` the values too.
            training: The denoiser's mode.
            call: The forward's `routing`.
            seed: The result of `forward_seed` for this forward; None (default) calls it here.
            grid_size: (rows, columns) of the tokens in raster order, needed by routes of rows; for a video (frames,
                rows, columns), where all frames keep the same rows.

        Returns:
            None for a dense forward; else per route the ids of the kept tokens, [B, K] int64 sorted ascending, or None
            for a route that keeps all tokens or is dropped by `path_drop=True`. For a route of rows over h rows and w
            columns, K is w * `num_kept_tokens(h, ratio)`.

        Raises:
            ValueError: `seed` or `force_keep` does not fit the batch, or a route of rows has no grid of N tokens.
        """
        # Settings, seed and mask.
        if not self.is_routing(training, call):
            return None
        said = self.resolve(call)
        batch_size, num_tokens = hidden_states.shape[:2]
        seed = self.forward_seed(hidden_states.device, call) if seed is None else seed
        _check_seed(seed, batch_size)
        force_keep = said.force_keep
        if force_keep is not None:
            if force_keep.shape not in ((num_tokens,), (batch_size, num_tokens)):
                raise ValueError(
                    f"Expected force_keep of shape [{num_tokens}] or [{batch_size}, {num_tokens}], "
                    f"got {list(force_keep.shape)}."
                )
            force_keep = force_keep.to(hidden_states.device, non_blocking=True)

        # The kept tokens of each route.
        kept_token_ids = []
        for index, route in enumerate(self.routes):
            if _skips(route, said):
                kept_token_ids.append(None)
                continue
            if route.unit == "token":
                kept_token_ids.append(_choose(route, index, said, seed, hidden_states, force_keep))
                continue
            grid = check_grid(grid_size, num_tokens)
            rows = rows_as_tokens(hidden_states, grid)  # B h D
            forced = None if force_keep is None else rows_as_tokens(force_keep.unsqueeze(-1), grid).any(dim=-1)
            row_ids = _choose(route, index, said, seed, rows, forced, frames=grid[0], row_width=grid[-1])
            kept_token_ids.append(None if row_ids is None else tokens_of_rows(row_ids, grid))
        return kept_token_ids if any(ids is not None for ids in kept_token_ids) else None

    def plan_drops(
        self,
        hidden_states: torch.Tensor,
        *,
        training: bool,
        call: RoutingCall | None = None,
        seed: torch.Tensor | None = None,
    ) -> "list[torch.Tensor | bool] | None":
        """Chooses the samples of one forward that skip the blocks of routes with rejoin "fuse".

        Args:
            hidden_states: [B, N, D]; only B and the device are used.
            training: The denoiser's mode.
            call: The forward's `routing`.
            seed: The same as for `plan`; needed if `is_dropping`.

        Returns:
            None for a forward without path drop; else per route True (all samples), False (none), or [B] bool.

        Raises:
            ValueError: `seed` does not fit the batch.
        """
        said = self.resolve(call)
        if said.path_drop:
            return [_skips(route, said) for route in self.routes]
        if not self.is_dropping(training, call):
            return None
        batch_size = hidden_states.shape[0]
        _check_seed(seed, batch_size)
        return [
            route.path_drop > 0.0
            and choose_samples(seed, route_index=index, batch_size=batch_size, share=route.path_drop)
            for index, route in enumerate(self.routes)
        ]

    def forward_seed(self, device: "torch.device | str", call: RoutingCall | None = None) -> torch.Tensor:
        """The seed of one forward: the given one, else a fresh one. int64, [] or [B]."""
        said = self.resolve(call)
        if said.seed is not None:
            return said.seed.to(device, non_blocking=True)
        return draw_routing_seed(said.generator, device=device)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.num_layers, self.routes, replace(self.defaults, generator=None)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.num_layers, self.routes, self.defaults = state
        self._surroundings = _Surroundings()

    def __repr__(self) -> str:
        return f"TokenRouter(routes={list(self.routes)}, num_layers={self.num_layers})"


def draw_routing_seed(
    generator: "torch.Generator | list[torch.Generator] | None" = None, *, device: "torch.device | str" = "cpu"
) -> torch.Tensor:
    """A fresh value for `RoutingCall.seed`.

    Args:
        generator: One generator for one seed for the whole batch, or a list of one per sample for a seed per sample.
            None uses torch's default generator of `device`.
        device: Device of the seed.

    Returns:
        int64 tensor on `device`, [] or [B], in [0, 2**62).
    """
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw_routing_seed(one, device=device) for one in generator])
    if generator is None:
        # No `generator=None`: it breaks an AOTInductor package (seen with torch 2.13).
        return torch.randint(0, 2**62, (), device=device, dtype=torch.int64)
    seed = torch.randint(0, 2**62, (), generator=generator, device=generator.device, dtype=torch.int64)
    return seed.to(device, non_blocking=True)


def get_token_router(denoiser: torch.nn.Module) -> TokenRouter:
    """The router of a denoiser of this package or of a model prepared by `apply_token_routing`.

    Looks through the wrappers of `torch.compile`, DDP, FSDP and PEFT.

    Raises:
        ValueError: The model has no router.
    """
    module = denoiser
    while module is not None:
        # Not isinstance: a model loaded from the Hub brings its own copy of the class.
        router: Any = getattr(module, "token_router", None)
        if hasattr(router, "is_routing"):
            return router
        module = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
    raise ValueError(
        f"Expected a denoiser with token routing, got {type(denoiser).__name__}, which has no `token_router`. "
        "Use a denoiser of this package, or prepare this one: apply_token_routing(model, TokenRoute(start=2, end=-4))."
    )


@contextmanager
def token_routing(denoiser: torch.nn.Module, **settings: Any) -> Iterator[TokenRouter]:
    """Changes how `denoiser` routes inside the `with` block, in this thread only.

    Args:
        denoiser: A model with a token router, see `get_token_router`.
        **settings: Fields of `RoutingCall`. Those not given keep their value.

    Yields:
        The router.

    Raises:
        ValueError: The model has no router, or a value is out of range.
        TypeError: The name of a setting is unknown.

    Example:
        >>> import torch
        >>> from diffusers_tread import TREADTransformer2DModel, token_routing
        >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8, routes="default").eval()
        >>> latents, timestep = torch.randn(1, 4, 8, 8), torch.zeros(1)
        >>> with token_routing(model, selection_ratio=0.7, seed=0):
        ...     weak = model(latents, timestep).sample
    """
    router = get_token_router(denoiser)
    surroundings, call = router._surroundings, RoutingCall(**settings)
    surroundings.calls = (call, *surroundings.calls)
    try:
        yield router
    finally:
        # Removes its own call, wherever it is: a guider may leave its block after an enclosing one has ended.
        surroundings.calls = tuple(one for one in surroundings.calls if one is not call)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _first_said(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _choose(
    route: TokenRoute,
    route_index: int,
    said: ResolvedCall,
    seed: torch.Tensor,
    tokens: torch.Tensor,
    force_keep: torch.Tensor | None,
    *,
    frames: int = 1,
    row_width: int = 1,
) -> torch.Tensor | None:
    """[B, K] ids of the kept among [B, N, D] tokens, or rows as tokens; None for all."""
    # How many are kept.
    batch_size, num_tokens = tokens.shape[:2]
    num_forced = 0 if said.num_forced is None else said.num_forced[frames, row_width]
    num_kept = max(num_kept_tokens(num_tokens, _ratio(route, said)), num_forced)
    if num_kept == num_tokens:
        return None

    # Which ones.
    hashes = subset_hashes(seed, route_index=route_index, batch_size=batch_size, num_tokens=num_tokens)  # B N
    if said.shared_subset:
        hashes = hashes[:1].expand(batch_size, -1)
    mix = _magnitude_mix(route, said)
    if mix == 0.0:
        priority = random_priority(hashes, force_keep=force_keep)
    else:
        priority = magnitude_priority(hashes, tokens, magnitude_mix=mix, force_keep=force_keep)
    return select_kept_tokens(priority, num_kept)


def _check_seed(seed: torch.Tensor, batch_size: int) -> None:
    if seed.dim() == 1 and seed.shape[0] != batch_size:
        raise ValueError(f"Expected one routing seed per sample ({batch_size}), got {seed.shape[0]}.")


def _skips(route: TokenRoute, said: ResolvedCall) -> bool:
    """Whether this forward skips the blocks of a route for all samples."""
    return bool(said.path_drop) and route.rejoin == "fuse"


def _ratio(route: TokenRoute, said: ResolvedCall) -> float:
    return route.selection_ratio if said.selection_ratio is None else said.selection_ratio


def _magnitude_mix(route: TokenRoute, said: ResolvedCall) -> float:
    return route.magnitude_mix if said.magnitude_mix is None else said.magnitude_mix
