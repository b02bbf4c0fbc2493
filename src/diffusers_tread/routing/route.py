# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Where a route starts and ends, and what share of the tokens takes it (TREAD, arXiv 2501.04765, section 3)."""

import inspect
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..field_docs import with_field_docs


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class TokenRoute:
    """A route r(start -> end): routed tokens skip blocks start..end and rejoin after `end`, unchanged.

    `rejoin` "input" or "sum" and `magnitude_mix` are options of the paper's first version (arXiv 2501.04765v1);
    `rejoin` "fuse" and `path_drop` are SPRINT's (arXiv 2510.21986).

    Example:
        >>> from diffusers_tread import TokenRoute
        >>> TokenRoute(start=2, end=-4).resolve(12)
        TokenRoute(start=2, end=8, selection_ratio=0.5)
    """

    start: int
    """First block that sees only the kept tokens, 0-based. Negative counts from the end of the model."""

    end: int
    """Last block that sees only the kept tokens, 0-based, **inclusive**. Negative counts from the end of the model."""

    selection_ratio: float = 0.5
    """Share of tokens routed **away** from blocks start..end, in [0, 1). 0.0 is dense. The paper trains with 0.5."""

    rejoin: Literal["state", "input", "sum", "fuse"] = "state"
    """What a routed token is after `end`: its "state" before `start` (v1's x_D_last), its "input" to the model's first
    block (v1's x_T), or the "sum" of both. The final paper uses "state". With "fuse" every token, kept or routed, goes
    on as a learned linear map of its states before `start` and after `end`, in dense forwards too; a mask vector
    replaces the second for routed tokens (`RouteFusion`). SPRINT uses start=2, end=-3 and selection_ratio=0.75."""

    rejoin_from: int | None = None
    """With rejoin "state": a "delayed" route. A routed token returns in the state it had before this block (0-based,
    at most `start`); None means before `start`. All tokens still run through the blocks up to `start`, but the work of
    the blocks from this one on only serves as context for the other tokens. Negative counts from the end of the model.
    The papers use None."""

    magnitude_mix: float = 0.0
    """l in [-1, 1] mixes token magnitude into the choice: tokens with the highest `(1 - |l|) * rand + |l| * m` are
    kept, where m is a token's L1 norm scaled to [0, 1] within its sample, or 1 minus that if l is negative. v1's code
    keeps the smallest: its `l1_reg` is -l, or +l with its `inverse`. The final paper uses 0.0, uniform subsets."""

    unit: Literal["token", "row"] = "token"
    """What is kept or routed as a whole: single tokens, or rows of the token grid. Kept rows form a grid again, which
    blocks that convolve, shift or scan over it need. The papers route tokens."""

    path_drop: float = 0.0
    """With rejoin "fuse": share of the samples, in [0, 1), for which a forward in training mode replaces the route's
    output by the mask vector for all tokens. The routing seed chooses the samples, as it does the kept tokens. This
    trains the weak branch of `PathDropGuidance`. SPRINT uses 0.05 to 0.1."""

    def __post_init__(self):
        # Blocks and ratio.
        for name in ("start", "end") if self.rejoin_from is None else ("start", "end", "rejoin_from"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise ValueError(f"Expected `{name}` to be a block index (int), got {getattr(self, name)!r}.")
        check_selection_ratio(self.selection_ratio)

        # Rejoin.
        if self.rejoin not in ("state", "input", "sum", "fuse"):
            raise ValueError(
                f"Expected rejoin 'state', 'input', 'sum' or 'fuse', got {self.rejoin!r}. The paper has 'state'."
            )
        if self.rejoin_from is not None and self.rejoin != "state":
            raise ValueError(
                f"Expected rejoin='state' with rejoin_from={self.rejoin_from}, got {self.rejoin!r}. Leave one of them "
                "out; rejoin_from=0 is rejoin='input'."
            )

        # Choice of tokens and samples.
        check_magnitude_mix(self.magnitude_mix)
        if self.unit not in ("token", "row"):
            raise ValueError(f"Expected unit 'token' or 'row', got {self.unit!r}. The papers route tokens.")
        is_number = isinstance(self.path_drop, (int, float)) and not isinstance(self.path_drop, bool)
        if not is_number or not 0.0 <= self.path_drop < 1.0:
            raise ValueError(f"Expected path_drop in [0, 1), a share of the samples, got {self.path_drop!r}.")
        if self.path_drop > 0.0 and self.rejoin != "fuse":
            raise ValueError(
                f"Expected rejoin='fuse' with path_drop={self.path_drop}, got {self.rejoin!r}. Leave path_drop out: "
                "without a fusion nothing stands for a path that is dropped."
            )

    def resolve(self, num_layers: int) -> "TokenRoute":
        """The same route with absolute indices, checked against a model of `num_layers` blocks.

        A `rejoin_from` equal to `start` becomes None, which means the same.

        Raises:
            ValueError: The route lies outside the model, is empty, or leaves fewer than two blocks after the rejoin
                (routes that reach the last two blocks hurt: arXiv 2501.04765, ablation of the route's position);
                `rejoin_from` lies outside the model or after `start`.

        Warns:
            UserWarning: Fewer than three blocks are left after the rejoin, unless the route ends in a fusion or a
                saved model is being loaded.
        """
        # Absolute indices.
        start = self.start + num_layers if self.start < 0 else self.start
        end = self.end + num_layers if self.end < 0 else self.end
        largest_end = num_layers - 3

        # Checks.
        if not (0 <= start < num_layers and 0 <= end < num_layers):
            raise ValueError(
                f"Expected a route inside the model's {num_layers} blocks (0 to {num_layers - 1}), got "
                f"start={self.start}, end={self.end}. Both count from 0, `end` is inclusive, negative values count "
                "from the end."
            )
        if end < start:
            raise ValueError(
                f"Expected start <= end, got start={self.start}, end={self.end}, which is an empty route "
                f"({start} to {end}) in a model of {num_layers} blocks. Use end >= {start}."
            )
        if end > largest_end:
            remedy = f"Use end <= {largest_end}" if start <= largest_end else "Start earlier, or use a deeper model"
            raise ValueError(
                f"Expected at least two blocks after the route, got end={self.end} in a model of {num_layers} blocks, "
                f"which leaves {num_layers - 1 - end}. {remedy} (the paper leaves three)."
            )
        warns = end == largest_end and self.rejoin != "fuse"  # SPRINT leaves two
        if warns and (stacklevel := _stacklevel_of_caller()) is not None:
            warnings.warn(
                f"The route ends at block {end} of {num_layers}: only two blocks are left after the rejoin. The paper "
                "leaves three; shorter tails hurt the samples.",
                stacklevel=stacklevel,
            )
        return replace(self, start=start, end=end, rejoin_from=self._resolve_rejoin_from(start, num_layers))

    def _resolve_rejoin_from(self, start: int, num_layers: int) -> int | None:
        """`rejoin_from` as an absolute index below `start`; None for the state before `start`."""
        if self.rejoin_from is None:
            return None
        rejoin_from = self.rejoin_from + num_layers if self.rejoin_from < 0 else self.rejoin_from
        if not 0 <= rejoin_from <= start:
            raise ValueError(
                f"Expected 0 <= rejoin_from <= start ({start}), got rejoin_from={self.rejoin_from} in a model of "
                f"{num_layers} blocks. Routed tokens come back in a state they had when the route began; leave it out "
                "for that before `start`."
            )
        return None if rejoin_from == start else rejoin_from

    def to_dict(self) -> dict[str, int | float | str]:
        """The route as JSON-serialisable values; `TokenRoute(**route.to_dict())` gives it back.

        Options that are off are left out, so configs without them look as they did before the options existed.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rejoin == "state":
            del values["rejoin"]
        if self.rejoin_from is None:
            del values["rejoin_from"]
        if self.magnitude_mix == 0.0:
            del values["magnitude_mix"]
        if self.unit == "token":
            del values["unit"]
        if self.path_drop == 0.0:
            del values["path_drop"]
        return values

    def __repr__(self) -> str:
        return f"TokenRoute({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


def check_selection_ratio(selection_ratio: float) -> None:
    """Raises ValueError unless `selection_ratio`, the share of tokens routed away, is a number in [0, 1)."""
    is_number = isinstance(selection_ratio, (int, float)) and not isinstance(selection_ratio, bool)
    if not is_number or not 0.0 <= selection_ratio < 1.0:
        raise ValueError(
            f"Expected a selection ratio in [0, 1), the share of tokens routed away, got {selection_ratio!r}. "
            "0.0 is dense, the paper trains with 0.5; 1.0 would leave no token in the routed blocks."
        )


def check_magnitude_mix(magnitude_mix: float) -> None:
    """Raises ValueError unless `magnitude_mix` is a number in [-1, 1]."""
    is_number = isinstance(magnitude_mix, (int, float)) and not isinstance(magnitude_mix, bool)
    if not is_number or not -1.0 <= magnitude_mix <= 1.0:
        raise ValueError(f"Expected magnitude_mix in [-1, 1], got {magnitude_mix!r}. 0.0 chooses uniformly.")


def default_route(num_layers: int, unit: Literal["token", "row"] = "token") -> TokenRoute:
    """The paper's route for a model of `num_layers` blocks: start 2, end num_layers - 4 (inclusive), ratio 0.5.

    Both ends are fixed distances from the ends of the model, not shares of its depth: 2 -> 8 for S/2 and B/2, 2 -> 20
    for L/2, 2 -> 24 for XL/2.

    Raises:
        ValueError: The model has fewer than six blocks, which leaves nothing to route.
    """
    if num_layers < 6:
        raise ValueError(
            f"Expected at least 6 blocks for the default route (start 2, end num_layers - 4), got {num_layers}. "
            "Use a deeper model, give a TokenRoute of your own, or routes=None for a model without routing."
        )
    return TokenRoute(start=2, end=num_layers - 4, selection_ratio=0.5, unit=unit)


def resolve_routes(
    routes: "TokenRoute | Mapping[str, Any] | Iterable[TokenRoute | Mapping[str, Any]] | None", num_layers: int
) -> tuple[TokenRoute, ...]:
    """Checks routes against a model of `num_layers` blocks; returns them with absolute indices, in the model's order.

    Args:
        routes: One route or several, as `TokenRoute` or as the mapping of `TokenRoute.to_dict`; None for no route.
        num_layers: Number of transformer blocks of the model.

    Raises:
        ValueError: As `TokenRoute.resolve`; two routes overlap; a `rejoin_from` lies inside another route, where
            routed tokens have no state; or a mapping has unknown or missing keys.
    """
    # A list of routes.
    if routes is None:
        return ()
    if isinstance(routes, (TokenRoute, Mapping)):
        return resolve_routes([routes], num_layers)
    if isinstance(routes, str) or not isinstance(routes, Iterable):
        raise ValueError(f"Expected a TokenRoute, its mapping, or a list of them, got {routes!r}.")

    # In the model's order, without overlaps.
    resolved = sorted((_as_route(route).resolve(num_layers) for route in routes), key=lambda route: route.start)
    for first, second in zip(resolved, resolved[1:], strict=False):
        if second.start <= first.end:
            raise ValueError(
                f"Expected routes that do not overlap, got blocks {first.start}-{first.end} and "
                f"{second.start}-{second.end} (both ends inclusive). Start the second at {first.end + 1} or later."
            )
    for route, other in itertools.product(resolved, resolved):
        # Up to `other.start` and after `other.end` every token has a state.
        if route.rejoin_from is not None and other.start < route.rejoin_from <= other.end:
            raise ValueError(
                f"Expected rejoin_from outside of other routes, got rejoin_from={route.rejoin_from} and a route over "
                f"blocks {other.start}-{other.end}, whose routed tokens have no state of their own there. Use "
                f"rejoin_from={other.start} or {other.end + 1}."
            )
    return tuple(resolved)


def num_kept_tokens(num_tokens: int, selection_ratio: float) -> int:
    """N - floor(N * ratio): how many of `num_tokens` tokens, or rows of them, go through the routed blocks.

    The small constant undoes float rounding such as 100 * 0.29 = 28.999…. At least one is kept, as the ratio is below
    1.
    """
    num_routed = math.floor(num_tokens * selection_ratio + 1e-9)
    return max(num_tokens - num_routed, 1)


def _stacklevel_of_caller() -> int | None:
    """The `stacklevel` with which `warnings.warn` in the calling function points at the user's line.

    Routes are checked deep inside constructors that diffusers and huggingface_hub wrap. None while a saved model is
    being loaded: its routes cannot be changed any more.
    """
    inside = {__name__.partition(".")[0], "diffusers", "huggingface_hub"}
    frame, level = inspect.currentframe().f_back, 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        if frame.f_code.co_name == "from_pretrained":
            return None
        frame, level = frame.f_back, level + 1
    return level


def _as_route(route: TokenRoute | Mapping[str, Any]) -> TokenRoute:
    if isinstance(route, TokenRoute):
        return route
    names = [field.name for field in fields(TokenRoute)]
    if not isinstance(route, Mapping) or not {"start", "end"} <= set(route) <= set(names):
        raise ValueError(f"Expected a TokenRoute or a mapping with the keys {names}, got {route!r}.")
    return TokenRoute(**route)
