# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The description of a scorer, and a scorer that is ready."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...field_docs import with_field_docs


ScoreFunction = Callable[[torch.Tensor, list[str]], torch.Tensor]
"""Called as `score(images, prompts)`, images uint8 [B, 3, H, W] on any device; gives [B] numbers, one per image."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class LoadedScorer:
    """What rates images for their prompts."""

    name: str
    """Of `SCORERS`."""
    score: ScoreFunction
    """The function."""
    description: dict[str, Any] = field(default_factory=dict)
    """Identifies in feature stores and results (JSON) what scores depend on besides images and prompts."""

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
            ValueError: The function gives another number of scores.
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
    """What a scorer is called, and how it is loaded."""

    label: str
    """Name in tables and results, such as "CLIPScore"."""
    load: Callable[..., tuple[ScoreFunction, dict[str, Any]]]
    """Called as `load(clip_model=..., device=...)`; gives the function and what identifies it (JSON)."""
    higher_is_better: bool = True
    """Direction in which images are better."""
