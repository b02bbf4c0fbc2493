# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The switch of a routed denoiser: whether it routes, how much, and which tokens are kept in one forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .route import TokenRoute, check_magnitude_mix, check_selection_ratio, num_kept_tokens, resolve_routes
from .subset import magnitude_priority, random_priority, select_kept_tokens, subset_hashes


class TokenRouter:
    """Holds the routes of one denoiser and plans each of its forwards. Has no parameters.

    By default a model in training mode routes and a model in evaluation mode is dense. Each attribute below may be set
    directly, or for a while with `token_routing`.

    Args:
        routes: One `TokenRoute`, several, their mappings, or None for a model that never routes.
        num_layers: Number of blocks of the denoiser.

    Attributes:
        routes (`tuple[TokenRoute, ...]`): The routes with absolute indices, in the model's order.
        enabled (`bool`, *optional*): True or False switches routing on or off; None (default) follows training mode.
        selection_ratio (`float`, *optional*): Overrides the ratio of every route **and** switches routing on, also in
            evaluation mode, unless `enabled` is False. 0.0 is dense. None (default): each route's own ratio.
        seed (`int | torch.Tensor`, *optional*): Makes the subset a pure function of (seed, route, sample, position).
            One integer for the whole batch, or an int64 tensor [B] with one per sample, which makes a sample's subset
            independent of the batch around it. It is not advanced: set a new one for each forward that needs a fresh
            subset. None (default): one integer per forward from `generator`.
        generator (`torch.Generator`, *optional*): Where fresh seeds come from; None (default) is torch's default
            generator of the tokens' device. Not copied nor pickled. A generator cannot be used inside a compiled
            forward: set `seed` there.
        shared_subset (`bool`): One random draw, and so one subset, for all samples of the batch. False by default. A
            [B, N] `force_keep` or a `magnitude_mix` still makes the samples' subsets differ.
        force_keep (`torch.Tensor`, *optional*): [N] or [B, N] bool, tokens that are never routed (text, padding,
            masked losses). If a sample forces more tokens than the ratio keeps, all samples keep that many. Each new
            largest count per sample recompiles a compiled forward: there, give the model `kept_token_ids`.
        magnitude_mix (`float`, *optional*): Overrides the `magnitude_mix` of every route. None (default): each route's
            own.

    Raises:
        ValueError: As `resolve_routes`; or an attribute is set to a value outside its range.
    """

    def __init__(self, routes: Any = None, *, num_layers: int):
        self.num_layers = num_layers
        self.routes = resolve_routes(routes, num_layers)
        self.enabled: bool | None = None
        self.generator = None
        self.shared_subset = False
        self.selection_ratio = None
        self.seed = None
        self.force_keep = None
        self.magnitude_mix = None

    @property
    def selection_ratio(self) -> float | None:
        return self._selection_ratio

    @selection_ratio.setter
    def selection_ratio(self, value: float | None) -> None:
        if value is not None:
            check_selection_ratio(value)
        self._selection_ratio = value

    @property
    def seed(self) -> torch.Tensor | None:
        return self._seed

    @seed.setter
    def seed(self, value: "int | torch.Tensor | None") -> None:
        # A tensor, never a Python int, for which a compiled forward would recompile at each change.
        if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
            value = torch.tensor(value, dtype=torch.int64)
        is_seed = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.dim() <= 1
        if value is not None and not is_seed:
            raise ValueError(f"Expected a 64-bit int or an int64 tensor [] or [B] as seed, got {_describe(value)}.")
        self._seed = value

    @property
    def generator(self) -> torch.Generator | None:
        return self._generator

    @generator.setter
    def generator(self, value: torch.Generator | None) -> None:
        if value is not None and not isinstance(value, torch.Generator):
            raise ValueError(
                f"Expected a torch.Generator or None, got {value!r}. For one generator per sample, set "
                "seed=draw_routing_seed(generators)."
            )
        self._generator = value

    @property
    def force_keep(self) -> torch.Tensor | None:
        return self._force_keep

    @force_keep.setter
    def force_keep(self, value: torch.Tensor | None) -> None:
        is_mask = isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() in (1, 2)
        if value is not None and not is_mask:
            raise ValueError(f"Expected a bool tensor [N] or [B, N] as force_keep, got {_describe(value)}.")
        # Counted here, once, so that no forward has to wait for the device.
        self._num_forced = 0 if value is None else int(value.sum(dim=-1).max())
        self._force_keep = value

    @property
    def magnitude_mix(self) -> float | None:
        return self._magnitude_mix

    @magnitude_mix.setter
    def magnitude_mix(self, value: float | None) -> None:
        if value is not None:
            check_magnitude_mix(value)
        self._magnitude_mix = value

    def is_routing(self, training: bool) -> bool:
        """Whether a forward in this mode takes any route."""
        asked = training or self.selection_ratio is not None if self.enabled is None else self.enabled
        return asked and any(self.route_ratio(route) > 0.0 for route in self.routes)

    def route_ratio(self, route: TokenRoute) -> float:
        """The ratio in force for one of the routes: the override if there is one, else its own."""
        return route.selection_ratio if self.selection_ratio is None else self.selection_ratio

    def plan(
        self, hidden_states: torch.Tensor, *, training: bool, seed: torch.Tensor | None = None
    ) -> list[torch.Tensor | None] | None:
        """Chooses the kept tokens of one forward. Call it once per forward, outside any checkpointed block.

        Args:
            hidden_states: [B, N, D], the tokens that may be routed. Only the shape and device count, and the values
                with `magnitude_mix`.
            training: The denoiser's mode.
            seed: What `forward_seed` gave for this forward; None (default) asks it now.

        Returns:
            None for a dense forward; else per route the ids of the kept tokens, [B, K] int64 sorted ascending, or None
            for a route that keeps all.

        Raises:
            ValueError: `seed` or `force_keep` does not fit the batch.
        """
        if not self.is_routing(training):
            return None
        batch_size, num_tokens = hidden_states.shape[:2]
        seed = self.forward_seed(hidden_states.device) if seed is None else seed
        if seed.dim() == 1 and seed.shape[0] != batch_size:
            raise ValueError(f"Expected one routing seed per sample ({batch_size}), got {seed.shape[0]}.")
        force_keep = self._forward_mask(hidden_states)

        kept_token_ids = []
        for index, route in enumerate(self.routes):
            num_kept = max(num_kept_tokens(num_tokens, self.route_ratio(route)), self._num_forced)
            if num_kept == num_tokens:
                kept_token_ids.append(None)
                continue
            hashes = subset_hashes(seed, route_index=index, batch_size=batch_size, num_tokens=num_tokens)  # B N
            if self.shared_subset:
                hashes = hashes[:1].expand(batch_size, -1)
            mix = route.magnitude_mix if self.magnitude_mix is None else self.magnitude_mix
            if mix == 0.0:
                priority = random_priority(hashes, force_keep=force_keep)
            else:
                priority = magnitude_priority(hashes, hidden_states, magnitude_mix=mix, force_keep=force_keep)
            kept_token_ids.append(select_kept_tokens(priority, num_kept))
        return kept_token_ids if any(ids is not None for ids in kept_token_ids) else None

    def forward_seed(self, device: "torch.device | str") -> torch.Tensor:
        """The seed of one forward: `seed` if it is set, else a fresh one from `generator`. int64, [] or [B]."""
        if self.seed is not None:
            return self.seed.to(device, non_blocking=True)
        return draw_routing_seed(self.generator, device=device)

    def _forward_mask(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.force_keep is None:
            return None
        batch_size, num_tokens = hidden_states.shape[:2]
        if self.force_keep.shape not in ((num_tokens,), (batch_size, num_tokens)):
            raise ValueError(
                f"Expected force_keep of shape [{num_tokens}] or [{batch_size}, {num_tokens}], "
                f"got {list(self.force_keep.shape)}."
            )
        return self.force_keep.to(hidden_states.device, non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}

    def __repr__(self) -> str:
        return f"TokenRouter(routes={list(self.routes)}, num_layers={self.num_layers})"


def draw_routing_seed(
    generator: "torch.Generator | list[torch.Generator] | None" = None, *, device: "torch.device | str" = "cpu"
) -> torch.Tensor:
    """A fresh value for `TokenRouter.seed`.

    Args:
        generator: One generator for a seed of the whole batch, or a list with one per sample for a seed per sample.
            None takes torch's default generator of `device`.
        device: Where the seed is needed.

    Returns:
        int64 tensor on `device`, [] or [B], in [0, 2**62).
    """
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw_routing_seed(one, device=device) for one in generator])
    source_device = device if generator is None else generator.device
    seed = torch.randint(0, 2**62, (), generator=generator, device=source_device, dtype=torch.int64)
    return seed.to(device, non_blocking=True)


def get_token_router(denoiser: torch.nn.Module) -> TokenRouter:
    """The router of a `TREADTransformer2DModel` or of a model prepared by `apply_token_routing`.

    Looks through the wrappers of `torch.compile`, DDP, FSDP and PEFT.

    Raises:
        ValueError: The model has no router.
    """
    return unwrap_routed(denoiser).token_router


def unwrap_routed(denoiser: torch.nn.Module) -> torch.nn.Module:
    """The module that `get_token_router` finds the router of, and raises as it does."""
    module = denoiser
    while module is not None:
        # By what it can do, not by its class: a model loaded from the Hub brings the code of its own.
        if hasattr(getattr(module, "token_router", None), "is_routing"):
            return module
        module = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
    raise ValueError(
        f"Expected a denoiser with token routing, got {type(denoiser).__name__}, which has no `token_router`. "
        "Use TREADTransformer2DModel."
    )


@contextmanager
def token_routing(denoiser: torch.nn.Module, **settings: Any) -> Iterator[TokenRouter]:
    """Changes how `denoiser` routes inside the `with` block; restores what it changed, also on error.

    Args:
        denoiser: A model with a token router, see `get_token_router`.
        **settings: Attributes of `TokenRouter` to change: `enabled`, `selection_ratio`, `seed`, `generator`,
            `shared_subset`, `force_keep`, `magnitude_mix`. What is not given stays as it is.

    Yields:
        The router.

    Raises:
        ValueError: The model has no router, the name of a setting is unknown, or its value is out of range.

    Example:
        >>> import torch
        >>> from diffusers_tread import TREADTransformer2DModel, token_routing
        >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8, routes="default").eval()
        >>> latents, timestep = torch.randn(1, 4, 8, 8), torch.zeros(1)
        >>> with token_routing(model, selection_ratio=0.7, seed=0):
        ...     weak = model(latents, timestep).sample
    """
    router = get_token_router(denoiser)
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise ValueError(f"Expected settings among {list(_SETTINGS)}, got {unknown}.")

    before = {name: getattr(router, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(router, name, value)
        yield router
    finally:
        for name, value in before.items():
            setattr(router, name, value)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


_SETTINGS = ("enabled", "selection_ratio", "seed", "generator", "shared_subset", "force_keep", "magnitude_mix")
