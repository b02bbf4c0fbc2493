# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance: the difference between a lightly and a heavily routed prediction guides (arXiv 2601.01608)."""

import math
from typing import Any

import torch
from diffusers import BaseGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg

from ..routing import TokenRouter, get_token_router
from ..routing.route import check_selection_ratio


class SparseGuidance(BaseGuidance):
    r"""D = w * D(x, t, c; strong_ratio) + (1 - w) * D(x, t, c; weak_ratio), both branches with the condition c.

    Works wherever diffusers' guiders do, on `TREADTransformer2DModel` and on models prepared by `apply_token_routing`:
    for each branch it sets the ratio of the denoiser's token router and puts it back afterwards. In the paper a single
    model does best with w = 1.4 and ratios 0.05-0.3 and 0.75-0.85, or w = 1.6 and 0.1-0.35 and 0.65-0.85.

    Args:
        guidance_scale: w, at least 0. 1.0 leaves the strong branch alone (and does not run the weak one).
        strong_ratio: Share of tokens routed away in the strong branch; 0.0 is dense.
        weak_ratio: Share of tokens routed away in the weak branch, larger than `strong_ratio` and below 1.
        null_weak_branch: Whether the weak branch also drops the condition, which adds classifier-free guidance.
        guidance_rescale: Share, in [0, 1], of the rescaling of arXiv 2305.08891, section 3.4.
        start: Share of the sampling steps after which guidance starts.
        stop: Share of the sampling steps after which guidance stops. Outside there is one dense prediction.
        enabled: False for one dense prediction everywhere.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> from diffusers_tread import SparseGuidance
        >>> guider = SparseGuidance(guidance_scale=1.4, strong_ratio=0.2, weak_ratio=0.8)
    """

    # The names that diffusers' modular loops know; here "uncond" is the weak branch.
    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.4,
        strong_ratio: float = 0.2,
        weak_ratio: float = 0.8,
        null_weak_branch: bool = False,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        check_selection_ratio(strong_ratio)
        check_selection_ratio(weak_ratio)
        if weak_ratio <= strong_ratio:
            raise ValueError(
                f"Expected weak_ratio > strong_ratio (the weak branch routes more tokens away), got weak_ratio="
                f"{weak_ratio}, strong_ratio={strong_ratio}."
            )
        if not 0.0 <= guidance_scale < math.inf:
            raise ValueError(f"Expected a finite guidance_scale >= 0, got {guidance_scale}.")
        if not 0.0 <= guidance_rescale <= 1.0:
            raise ValueError(f"Expected guidance_rescale in [0, 1], got {guidance_rescale}.")

        self.guidance_scale = guidance_scale
        self.strong_ratio = strong_ratio
        self.weak_ratio = weak_ratio
        self.null_weak_branch = null_weak_branch
        self.guidance_rescale = guidance_rescale
        self._changed_router: tuple[TokenRouter, dict[str, Any]] | None = None

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Sets the branch's ratio; call `cleanup_models` after the forward, also on error.

        Raises:
            ValueError: The denoiser has no routes, without which both branches would be the same.
        """
        self.cleanup_models(denoiser)  # what a caller left behind that failed in between
        router, guides = get_token_router(denoiser), self._is_within_range()
        if guides and not router.routes:
            raise ValueError(
                f"Expected a denoiser with token routes, got {type(denoiser).__name__} with routes=None. Use a model "
                "trained with routes, or another guider."
            )
        self._count_prepared += 1
        self._changed_router = (router, {"enabled": router.enabled, "selection_ratio": router.selection_ratio})
        router.enabled = guides
        router.selection_ratio = self.strong_ratio if self.is_conditional else self.weak_ratio

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Puts the router's settings back."""
        if self._changed_router is not None:
            router, before = self._changed_router
            self._changed_router = None
            for name, value in before.items():
                setattr(router, name, value)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch per branch from `{name: (conditional, unconditional)}` or `{name: tensor}`."""
        return [self._prepare_batch(data, index, prediction) for index, prediction in self._branches()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, from the block state of a modular pipeline."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, prediction)
            for index, prediction in self._branches()
        ]

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Combines the branches (arXiv 2601.01608, the Sparse Guidance equation).

        Args:
            pred_cond: The strong prediction, any shape.
            pred_uncond: The weak prediction, same shape; None where there is one branch only.
        """
        pred = pred_cond
        if pred_uncond is not None:
            pred = torch.lerp(pred_uncond, pred_cond, self.guidance_scale)
            if self.guidance_rescale > 0.0:
                pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the branch being run is the strong one."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Branches, and so model calls, of the current step."""
        return 2 if self._is_within_range() and self.guidance_scale != 1.0 else 1

    def _branches(self) -> list[tuple[int, str]]:
        """Per branch the index into (conditional, unconditional) inputs and the prediction's name."""
        self._count_prepared = 0  # the strong branch comes first, also in a loop that does not call `set_state`
        tuple_indices = [0, 1 if self.null_weak_branch else 0][: self.num_conditions]
        return list(zip(tuple_indices, self._input_predictions, strict=False))

    def _is_within_range(self) -> bool:
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first = int(self._start * self._num_inference_steps)
        last = int(self._stop * self._num_inference_steps)
        return first <= self._step < last
