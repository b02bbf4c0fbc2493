# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Inception Score (arXiv 1606.03498)."""

import math
from itertools import pairwise

import torch

from .metric import MeanStd, Metric, as_features


def inception_score(logits: torch.Tensor, *, num_splits: int = 10) -> MeanStd:
    """Computes exp(E KL(p(y|x) || p(y))) on consecutive, nearly equal parts of the samples.

    Args:
        logits: Logits [N, K] of N samples and K classes, in the order in which the samples were made. Each part has a
            p(y) of its own, so samples that are sorted by class score too low. Published scores use Inception's logits
            without bias.
        num_splits: Number of parts. ADM's parts have 5,000 samples, which is ten parts for 50,000 samples.

    Returns:
        Mean and standard deviation over the parts; a score lies between 1 and K.

    Raises:
        ValueError: There are fewer samples than parts, or the logits have another shape or are not finite.
    """
    if not 1 <= num_splits <= len(logits):
        raise ValueError(
            f"Expected num_splits from 1 to the number of samples ({len(logits)}), got {num_splits}. Use fewer splits."
        )
    log_probabilities = as_features(logits).log_softmax(dim=1)
    bounds = [len(logits) * part // num_splits for part in range(num_splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        log_p = log_probabilities[start:stop]
        log_marginal = log_p.logsumexp(dim=0) - math.log(stop - start)
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return MeanStd(mean=scores.mean().item(), std=scores.std(correction=0).item())


INCEPTION_SCORE = Metric(
    label="Inception Score",
    # As ADM computes it: on parts of 5,000 samples.
    compute=lambda logits: inception_score(logits, num_splits=max(1, len(logits) // 5000)),
    takes="features",
    output="logits",
    higher_is_better=True,
    needs_reference=False,
)
