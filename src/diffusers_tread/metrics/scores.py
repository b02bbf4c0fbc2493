# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Summarises the scores of images: their means, and a table with a row per image."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..files import whole
from .image_sources import ImageSource, KeptImages
from .metric import MeanError
from .registry import METRICS, check_values, named_values
from .scorers import LoadedScorer


def check_scorers(scorers: Sequence[LoadedScorer], source: ImageSource) -> None:
    """Raises ValueError if scorers cannot rate the images, or if their values have the name of a metric."""
    if not scorers:
        return
    if not hasattr(source.source if isinstance(source, KeptImages) else source, "prompt"):
        raise ValueError(
            f"Expected images of prompts for the scorers, got {type(source).__name__}. Use PromptImages, or give your "
            "images a method `prompt(index)`."
        )
    if len(source) < 2:
        raise ValueError(f"Expected at least 2 images for the standard error of scores, got {len(source)}. Use more.")
    if taken := [scorer.output for scorer in scorers if scorer.output in METRICS]:
        raise ValueError(f"Expected scorers whose values have names of their own, got {taken}, those of metrics.")


def mean_scores(scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Averages the scores [N] of each scorer in float64, N at least 2, and names the values as in results files.

    Raises:
        ValueError: A mean is not finite.
    """
    values = {}
    for name, one in scores.items():
        one = one.double()
        error = one.std() / len(one) ** 0.5
        values |= named_values(name, MeanError(mean=one.mean().item(), standard_error=error.item()))
    check_values(values)
    return values


def write_scores(path: str | Path, scores: Mapping[str, torch.Tensor], source: ImageSource) -> None:
    """Writes a .csv file with a row per image: its index, its prompt and its scores."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: one.tolist() for name, one in scores.items()}
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["index", "prompt", *columns])
        for index, row in enumerate(zip(*columns.values(), strict=True)):
            table.writerow([index, source.prompt(index), *row])
