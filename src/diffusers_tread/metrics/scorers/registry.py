# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The table of scorers, and loading them by name.

To add a scorer to this package, write a file with its function and add a line to `SCORERS`. Outside of this package,
call `register_scorer`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...registry import add_entry
from .clip_score import CLIP_SCORE, DEFAULT_CLIP_MODEL
from .scorer import LoadedScorer, ScoreFunction, Scorer


SCORERS: dict[str, Scorer] = {"clip": CLIP_SCORE}
"""The scorers, by their names in `--scorers`; results add "_score"."""


def register_scorer(
    name: str,
    score: ScoreFunction,
    *,
    label: str | None = None,
    higher_is_better: bool = True,
    settings: dict[str, Any] | None = None,
) -> None:
    """Registers a scorer for `load_scorers` and `--scorers`.

    Args:
        name: Its name; its mean is called `<name>_score` in results.
        score: Called as `score(images, prompts)`, with images uint8 [B, 3, H, W] on any device and a list of B texts;
            returns [B] finite numbers. The score of an image must not depend on other images of its batch.
        label: Name in tables; None for `name`.
        higher_is_better: Whether a higher score means better images.
        settings: Everything scores depend on besides images and prompts (JSON), such as a model and its revision. A
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
        names: Names in `SCORERS`.
        clip_model: Model of "clip": a repository on the Hub, or a local folder.
        device: Device of its network.

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
