# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A selection ratio that changes during sampling (SG_FID of Sparse Guidance, arXiv 2601.01608)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..field_docs import with_field_docs
from ..routing.route import check_selection_ratio


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class RatioSchedule:
    """A ratio that goes from `first` at the first model call to `last` at the last one.

    Its inverse, first + last - ratio, swaps the two. The schedule runs over model calls, as `start` and `stop` of
    guiders do, not over noise levels: guiders do not know those, and schedulers define them differently.

    Raises:
        ValueError: A ratio outside [0, 1), or an unknown shape.

    Example:
        >>> from diffusers_tread import RatioSchedule
        >>> [round(RatioSchedule(first=0.6, last=0.0).at(progress), 2) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.6, 0.51, 0.3, 0.0]
    """

    first: float
    """Share of tokens routed away at the first model call, in [0, 1)."""

    last: float
    """Share of tokens routed away at the last model call, in [0, 1)."""

    shape: Literal["cosine", "linear"] = "cosine"
    """The shape in between: "cosine" is half a period, flat at both ends."""

    def __post_init__(self):
        check_selection_ratio(self.first)
        check_selection_ratio(self.last)
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"Expected shape 'cosine' or 'linear', got {self.shape!r}.")

    def at(self, progress: float) -> float:
        """The ratio at `progress`, in [0, 1]: 0 at the first model call, 1 at the last."""
        share = (1.0 - math.cos(math.pi * progress)) / 2.0 if self.shape == "cosine" else progress
        return (1.0 - share) * self.first + share * self.last  # exact at both ends

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON-serialisable values; `RatioSchedule(**schedule.to_dict())` gives it back."""
        return asdict(self)


def as_schedule(ratio: Any) -> RatioSchedule:
    """A schedule from a schedule, its mapping, or a constant ratio.

    Raises:
        ValueError: `ratio` is none of these, or as `RatioSchedule`.
    """
    if hasattr(ratio, "at"):  # not isinstance: diffusers loads a new class for each pipeline with code of its own
        return ratio
    if not isinstance(ratio, Mapping):
        check_selection_ratio(ratio)
        return RatioSchedule(first=ratio, last=ratio)
    names = [field.name for field in fields(RatioSchedule)]
    if not {"first", "last"} <= set(ratio) <= set(names):
        raise ValueError(f"Expected a ratio, a RatioSchedule or a mapping with the keys {names}, got {dict(ratio)!r}.")
    return RatioSchedule(**ratio)
