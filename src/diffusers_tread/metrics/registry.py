# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The table of metrics, used by evaluation, examples/evaluate_tread.py, results and model cards.

To add a metric to this package, write a file with its formula and a `Metric` that describes it, and add a line to
`METRICS`. Outside of this package, call `register_metric`.
"""

from collections.abc import Mapping, Sequence
from math import isfinite

from ..registry import add_entry
from .frechet import FID, SFID
from .inception_score import INCEPTION_SCORE
from .metric import MeanError, MeanStd, Metric
from .networks import FeatureExtractor
from .precision_recall import PRECISION, RECALL
from .scorers import SCORERS


METRICS: dict[str, Metric] = {
    "fid": FID,
    "sfid": SFID,
    "inception_score": INCEPTION_SCORE,
    "precision": PRECISION,
    "recall": RECALL,
}
"""The metrics, by their names in `--metrics` and in results files."""


def register_metric(name: str, metric: Metric) -> None:
    """Registers a metric; docs/evaluation.md has an example.

    Args:
        name: Its name for `metrics=` and `--metrics`.
        metric: Its description.

    Raises:
        ValueError: The name is taken.
    """
    add_entry(METRICS, name, metric)


def possible_metrics(extractor: FeatureExtractor) -> tuple[str, ...]:
    """Lists the metrics whose output the extractor has."""
    return tuple(name for name, metric in METRICS.items() if metric.output in extractor.outputs)


def check_metrics(metrics: Sequence[str], extractor: FeatureExtractor, *, num_samples: int | None = None) -> None:
    """Raises ValueError for metrics that do not exist or cannot be computed.

    Args:
        metrics: Names of metrics.
        extractor: The network, which must have the outputs that the metrics need.
        num_samples: Number of images; None if it does not matter.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"Expected metrics among {list(METRICS)}, got {name!r}.")
        metric = METRICS[name]
        if metric.output not in extractor.outputs:
            raise ValueError(
                f"Expected an extractor with the output {metric.output!r} for {name}, got {extractor.name} with "
                f"{list(extractor.outputs)}. Leave {name} out or use 'inception'."
            )
        if num_samples is not None and num_samples < metric.min_samples:
            raise ValueError(f"Expected at least {metric.min_samples} images for {name}, got {num_samples}. Use more.")


def named_values(name: str, value: float | MeanStd | MeanError) -> dict[str, float]:
    """Names the values of a metric or a scorer as in results files, with the suffixes "_std" and "_standard_error"."""
    if isinstance(value, MeanError):
        return {name: value.mean, f"{name}_standard_error": value.standard_error}
    return {name: value.mean, f"{name}_std": value.std} if isinstance(value, MeanStd) else {name: value}


def check_values(values: Mapping[str, float]) -> None:
    """Raises ValueError for values that are not finite numbers."""
    wrong = {name: value for name, value in values.items() if type(value) not in (int, float) or not isfinite(value)}
    if wrong:
        raise ValueError(f"Expected finite numbers as values of metrics, got {wrong}. Look at the features.")


def value_label(name: str) -> str:
    """Finds the label for a name from `named_values`; for names that are not in the tables, it is the name itself."""
    entries = METRICS | {f"{scorer}_score": entry for scorer, entry in SCORERS.items()}
    for suffix, what in {"": "", "_std": ", standard deviation", "_standard_error": ", standard error"}.items():
        if name.endswith(suffix) and (entry := entries.get(name.removesuffix(suffix))):
            return f"{entry.label}{what}"
    return name


def is_higher_better(name: str) -> bool | None:
    """Whether a higher value is better; None for a standard deviation or error, and for names not in the tables."""
    entry = METRICS.get(name) or (SCORERS.get(name.removesuffix("_score")) if name.endswith("_score") else None)
    return None if entry is None else entry.higher_is_better
