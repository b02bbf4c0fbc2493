# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which scorers there are, and loading them by name.

A scorer is added by a file with its function and a line in `SCORERS`; outside of this package by `register_scorer`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...registry import add_entry
from .clip_score import CLIP_SCORE, DEFAULT_CLIP_MODEL
from .scorer import LoadedScorer, ScoreFunction, Scorer


SCORERS: dict[str, Scorer] = {"clip": CLIP_SCORE}
"""By the name that `--scorers` uses; results add "_score"."""


def register_scorer(
    name: str,
    score: ScoreFunction,
    *,
    label: str | None = None,
    higher_is_better: bool = True,
    settings: dict[str, Any] | None = None,
) -> None:
    """Adds a scorer to those that `load_scorers` and `--scorers` know.

    Args:
        name: What they call it; results call its mean `<name>_score`.
        score: Called as `score(images, prompts)`, images uint8 [B, 3, H, W] on any device, prompts a list of B texts;
            gives [B] finite numbers. The score of an image must not depend on the others of its batch.
        label: Name in tables; None for `name`.
        higher_is_better: Direction in which images are better.
        settings: What scores depend on besides images and prompts (JSON), such as a model and its revision. A
            resumed evaluation with other settings is refused.

    Raises:
        ValueError: The name is taken.
    """
    description = {"settings": settings or {}}
    scorer = Scorer(label=label or name, load=lambda **_: (score, description), higher_is_better=higher_is_better)
    add_entry(SCORERS, name, scorer)


def load_scorers(
    names: Sequence[str], *, clip_model: str = DEFAULT_CLIP_MODEL, device: str | torch.device = "cpu"
) -> tuple[LoadedScorer, ...]:
    """Loads scorers by name.

    Args:
        names: Names of `SCORERS`.
        clip_model: Repository on the Hub, or a local folder, of the model of "clip".
        device: Where its network runs.

    Raises:
        ValueError: A name is unknown or given twice, or a model cannot be loaded.
        ImportError: transformers is not installed.
    """
    if unknown := [name for name in names if name not in SCORERS]:
        raise ValueError(
            f"Expected scorers among {list(SCORERS)}, got {unknown}. Register a scorer of your own first."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"Expected each scorer once, got {list(names)}.")
    loaded = []
    for name in names:
        score, description = SCORERS[name].load(clip_model=clip_model, device=device)
        loaded.append(LoadedScorer(name=name, score=score, description=description))
    return tuple(loaded)
