# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A metric in one file: how far the means of the features are apart."""

from diffusers_tread.metrics import Metric, register_metric


def mean_distance(samples, reference):
    return (samples.mean - reference.mean).norm().item()


register_metric(
    "mean_distance",
    Metric(
        label="Distance of the means", compute=mean_distance, takes="statistics", output="features",
        higher_is_better=False,
    ),
)  # fmt: skip
