# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance: guidance by the difference of a lightly and a heavily routed prediction (arXiv 2601.01608)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import BaseGuidance  # noqa: F401 - diffusers looks for the base class here, by name
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg

from ..typed_config import register_to_config
from .branches import Branch, BranchGuidance, check_routes
from .ratio_schedule import RatioSchedule, as_schedule


# arXiv 2601.01608, ImageNet-256, Euler with 40 steps. The paper gives no guidance scale for "flops" and "fid", and
# only the ends of the cosine of "fid": half a period is our reading.
_PRESETS = {
    "single": {"guidance_scale": 1.4, "strong_ratio": 0.2, "weak_ratio": 0.8},
    "flops": {"strong_ratio": 0.5, "weak_ratio": 0.9},
    "fid": {
        "strong_ratio": RatioSchedule(first=0.0, last=0.6),
        "weak_ratio": RatioSchedule(first=0.6, last=0.0),
        "weak_checkpoint": True,
    },
}


class SparseGuidance(BranchGuidance):
    r"""D = w * D(x, t, c; strong_ratio) + (1 - w) * D(x, t, c; weak_ratio), both branches with the condition c.

    Works wherever diffusers' guiders do, on `TREADTransformer2DModel` and on models prepared by `apply_token_routing`.
    `null_weak_branch` and `weak_checkpoint` give related kinds of guidance. `weak_checkpoint` with ratios of 0.0 is
    autoguidance (arXiv 2406.02507, with the condition in both branches, as in the paper and unlike diffusers'
    `AutoGuidance`). Attributes changed later affect sampling, but the constructor's arguments are what is saved.

    Args:
        guidance_scale: w, at least 0. 1.0 is the strong branch alone (the weak one is not run).
        strong_ratio: Share of tokens routed away in the strong branch; 0.0 is dense. A `RatioSchedule` (or its
            mapping) changes it from model call to model call.
        weak_ratio: Share of tokens routed away in the weak branch, below 1, or its schedule. Unless
            `weak_checkpoint`, never below `strong_ratio`, and not always equal to it.
        null_weak_branch: Whether the weak branch also drops the condition, which adds classifier-free guidance.
        weak_checkpoint: Whether another denoiser, an earlier checkpoint, runs the weak branch, which adds
            autoguidance. `TREADPipeline` uses its `guidance_transformer`; a loop of your own calls `prepare_models`,
            the forward and `cleanup_models` with that denoiser for the second branch.
        guidance_rescale: Share, in [0, 1], of the rescaling of arXiv 2305.08891, section 3.4.
        start: Share of the model calls after which guidance starts.
        stop: Share of the model calls after which guidance stops. Unguided steps make one dense prediction, with the
            condition, by the main denoiser.
        enabled: False for one dense prediction in every step.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from diffusers_tread import RatioSchedule, SparseGuidance
        >>> guider = SparseGuidance(guidance_scale=1.4, strong_ratio=0.2, weak_ratio=0.8)
        >>> guider = SparseGuidance(strong_ratio=0.0, weak_ratio=RatioSchedule(first=0.8, last=0.2, shape="linear"))
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.4,
        strong_ratio: "float | RatioSchedule | Mapping[str, Any]" = 0.2,
        weak_ratio: "float | RatioSchedule | Mapping[str, Any]" = 0.8,
        null_weak_branch: bool = False,
        weak_checkpoint: bool = False,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        # Checks.
        super().__init__(start, stop, enabled)
        schedules = {"strong_ratio": as_schedule(strong_ratio), "weak_ratio": as_schedule(weak_ratio)}
        if not weak_checkpoint:
            _check_gap(**schedules)
        if not 0.0 <= guidance_scale < math.inf:
            raise ValueError(f"Expected a finite guidance_scale >= 0, got {guidance_scale}.")
        if not 0.0 <= guidance_rescale <= 1.0:
            raise ValueError(f"Expected guidance_rescale in [0, 1], got {guidance_rescale}.")

        # Attributes.
        self.guidance_scale = guidance_scale
        self.strong_ratio = _shorten(schedules["strong_ratio"])
        self.weak_ratio = _shorten(schedules["weak_ratio"])
        self.null_weak_branch = null_weak_branch
        self.weak_checkpoint = weak_checkpoint
        self.guidance_rescale = guidance_rescale

        # The config holds schedules as mappings, for JSON.
        for name in schedules:
            ratio = getattr(self, name)
            self.register_to_config(**{name: ratio.to_dict() if isinstance(ratio, RatioSchedule) else ratio})

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> "SparseGuidance":
        """The settings of the paper (arXiv 2601.01608; XL/2 on ImageNet-256), for its models and 40 Euler steps.

        Args:
            preset: "single": one model, w = 1.4, ratios 0.2 and 0.8, within the best ranges 0.05-0.3 and 0.75-0.85.
                "flops": one model with ratios 0.5 and 0.9 (SG_FLOPS, FID 2.14 at 97.67 GFLOPs per step).
                "fid": the weak branch is an early checkpoint, whose ratio falls by a cosine from 0.6 to 0 while the
                main one's rises by its inverse (SG_FID, FID 1.58 at 173.16 GFLOPs; checkpoint of 50K steps).
            **settings: Arguments of the constructor that add to or replace the preset's. "flops" and "fid" need a
                `guidance_scale`: the paper does not give theirs.

        Raises:
            ValueError: An unknown preset, or no `guidance_scale` for a preset without one.

        Example:
            >>> from diffusers_tread import SparseGuidance
            >>> SparseGuidance.from_preset("flops", guidance_scale=1.5).weak_ratio
            0.9
        """
        if preset not in _PRESETS:
            raise ValueError(f"Expected a preset among {list(_PRESETS)}, got {preset!r}.")
        settings = {**_PRESETS[preset], **settings}
        if "guidance_scale" not in settings:
            raise ValueError(
                f"Expected a guidance_scale for the preset {preset!r}, got none: its paper does not print one. Choose "
                "it, for example guidance_scale=1.4, the value of the preset 'single'."
            )
        return cls(**settings)

    def check_denoisers(self, denoiser: torch.nn.Module, guidance_denoiser: torch.nn.Module | None = None) -> None:
        """Raises ValueError if these denoisers cannot run the branches; call it before sampling.

        Args:
            denoiser: The denoiser of the strong branch, and of the weak one unless `weak_checkpoint`.
            guidance_denoiser: The denoiser of the weak branch if `weak_checkpoint`; ignored otherwise.
        """
        if not self._enabled:
            return
        if self.weak_checkpoint and guidance_denoiser is None:
            raise ValueError(
                "Expected a second denoiser for the weak branch (weak_checkpoint=True), got None. Give the pipeline "
                "guidance_transformer=<an earlier checkpoint>, or use weak_checkpoint=False."
            )
        check_routes(denoiser, _largest(self.strong_ratio))
        check_routes(guidance_denoiser if self.weak_checkpoint else denoiser, _largest(self.weak_ratio))

    def branches(self) -> list[Branch]:
        """The strong branch and, if this step is guided, the weak one.

        Raises:
            ValueError: A ratio is a schedule and `set_state` was not called.
        """
        if not self._is_within_range():
            return [Branch()]
        strong = Branch(selection_ratio=self._ratio_now(self.strong_ratio))
        if self.guidance_scale == 1.0:
            return [strong]
        weak = Branch(
            condition="null" if self.null_weak_branch else "given",
            selection_ratio=self._ratio_now(self.weak_ratio),
            denoiser="guidance" if self.weak_checkpoint else "main",
            shares_prefix=not (self.null_weak_branch or self.weak_checkpoint),
        )
        return [strong, weak]

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Combines the branches (arXiv 2601.01608, the Sparse Guidance equation).

        Args:
            pred_cond: The strong prediction, any shape.
            pred_uncond: The weak prediction, same shape; None if there is only one branch.
        """
        pred = pred_cond
        if pred_uncond is not None:
            pred = torch.lerp(pred_uncond, pred_cond, self.guidance_scale)
            if self.guidance_rescale > 0.0:
                pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _ratio_now(self, ratio: Any) -> float:
        if not hasattr(ratio, "at"):
            return ratio
        if self._num_inference_steps is None:
            raise ValueError(
                "Expected the current step, which a RatioSchedule needs, got none. Call guider.set_state(step=..., "
                "num_inference_steps=..., timestep=...) before each step."
            )
        return ratio.at(self._step / max(self._num_inference_steps - 1, 1))


def _check_gap(*, strong_ratio: RatioSchedule, weak_ratio: RatioSchedule) -> None:
    """Raises ValueError unless the weak branch routes at least as many tokens away as the strong one at every model
    call, and more at some."""
    gaps = [weak_ratio.at(i / 100) - strong_ratio.at(i / 100) for i in range(101)]
    if min(gaps) < 0.0 or max(gaps) == 0.0:
        raise ValueError(
            "Expected weak_ratio > strong_ratio (the weak branch routes more tokens away), got weak_ratio="
            f"{_shorten(weak_ratio)}, strong_ratio={_shorten(strong_ratio)}. Exchange them, or use "
            "weak_checkpoint=True with an earlier checkpoint."
        )


def _largest(ratio: "float | RatioSchedule") -> float:
    """The largest value of a ratio or of its schedule."""
    schedule = as_schedule(ratio)
    return max(schedule.first, schedule.last)


def _shorten(schedule: RatioSchedule) -> "float | RatioSchedule":
    """A constant schedule as its number."""
    return schedule.first if schedule.first == schedule.last else schedule
