# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Path-drop guidance: a prediction without the routes' blocks guides the full one (SPRINT, arXiv 2510.21986)."""

import math

import torch
from diffusers import BaseGuidance  # noqa: F401 - diffusers looks for the base class here, by name
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput

from ..routing import get_token_router
from ..routing.route import check_selection_ratio
from .branches import Branch, BranchGuidance, check_routes


class PathDropGuidance(BranchGuidance):
    r"""D = w * D(x, t, c) + (1 - w) * D(x, t, null; path dropped): classifier-free guidance with a cheap weak branch.

    The weak branch skips the blocks of the routes; the learned mask vector replaces their output. This needs a
    denoiser with a route of `rejoin="fuse"`, trained with `path_drop`.

    Args:
        guidance_scale: w, at least 0. 1.0 is the strong branch alone (the weak one is not run).
        strong_ratio: Share of tokens routed away in the strong branch, in [0, 1); 0.0 is dense, as in the paper.
        null_weak_branch: Whether the weak branch also drops the condition, as in the paper.
        start: Share of the model calls after which guidance starts.
        stop: Share of the model calls after which guidance stops. Unguided steps make one dense prediction, with the
            condition.
        enabled: False for one dense prediction in every step.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from diffusers_tread import PathDropGuidance
        >>> guider = PathDropGuidance(guidance_scale=2.0, stop=0.8)
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.5,
        strong_ratio: float = 0.0,
        null_weak_branch: bool = True,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        if not 0.0 <= guidance_scale < math.inf:
            raise ValueError(f"Expected a finite guidance_scale >= 0, got {guidance_scale}.")
        check_selection_ratio(strong_ratio)
        self.guidance_scale = guidance_scale
        self.strong_ratio = strong_ratio
        self.null_weak_branch = null_weak_branch

    def check_denoisers(self, denoiser: torch.nn.Module, guidance_denoiser: torch.nn.Module | None = None) -> None:
        """Raises ValueError if `denoiser` cannot run the branches; call it before sampling.

        Args:
            denoiser: The denoiser of both branches.
            guidance_denoiser: Ignored.
        """
        if not self._enabled:
            return
        check_routes(denoiser, self.strong_ratio)
        get_token_router(denoiser).check_path_drop()

    def branches(self) -> list[Branch]:
        """The strong branch and, if this step is guided, the weak one."""
        if not self._is_within_range():
            return [Branch()]
        strong = Branch(selection_ratio=self.strong_ratio)
        if self.guidance_scale == 1.0:
            return [strong]
        weak = Branch(
            condition="null" if self.null_weak_branch else "given",
            path_drop=True,
            shares_prefix=not self.null_weak_branch,
        )
        return [strong, weak]

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Combines the branches.

        Args:
            pred_cond: The strong prediction, any shape.
            pred_uncond: The weak prediction, same shape; None if there is only one branch.
        """
        pred = pred_cond if pred_uncond is None else torch.lerp(pred_uncond, pred_cond, self.guidance_scale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
