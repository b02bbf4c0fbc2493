# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The description of a scorer, and a scorer that is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...field_docs import with_field_docs


ScoreFunction = Callable[[torch.Tensor, list[str]], torch.Tensor]
"""Called as `score(images, prompts)`, with images uint8 [B, 3, H, W] on any device; returns [B], one per image."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class LoadedScorer:
    """A scorer that is ready to rate images for their prompts."""

    name: str
    """Name in `SCORERS`."""
    score: ScoreFunction
    """The function."""
    description: dict[str, Any] = field(default_factory=dict)
    """Everything scores depend on besides images and prompts (JSON), for feature stores and results."""

    @property
    def output(self) -> str:
        """Name of the scores in feature stores and of their mean in results."""
        return f"{self.name}_score"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Rates images.

        Args:
            images: [B, 3, H, W] uint8, on any device.
            prompts: One per image.

        Returns:
            [B, 1] float32 on the CPU.

        Raises:
            ValueError: The function returns another number of scores.
        """
        scores = torch.as_tensor(self.score(images, prompts), dtype=torch.float32, device="cpu")
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"Expected {len(prompts)} scores of scorer {self.name!r}, one per image, got {tuple(scores.shape)}. "
                "Return a tensor [B]."
            )
        return scores[:, None]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """The label of a scorer, and how it is loaded."""

    label: str
    """Name in tables and results, such as "CLIPScore"."""
    load: Callable[..., tuple[ScoreFunction, dict[str, Any]]]
    """Called as `load(clip_model=..., device=...)`; returns the function and its description (JSON)."""
    higher_is_better: bool = True
    """Whether a higher score means better images."""
