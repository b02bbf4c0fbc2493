# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Inception Score, and precision and recall of features.

Own formulas of a few lines each, because torch-fidelity's import torchvision; the tests hold them to torch-fidelity's.

Shapes: N and M samples, D features, K classes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from .statistics import as_features


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (of the population) over the splits; between 1 and the number of classes."""

    mean: float
    std: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]."""

    precision: float
    recall: float


def inception_score(logits: torch.Tensor, *, num_splits: int = 10) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))) over consecutive, nearly equal parts of the samples (arXiv 1606.03498).

    Args:
        logits: [N, K], in the order in which the samples were made: samples sorted by class score too low, since each
            part has a p(y) of its own. The published figures are of Inception's logits without bias.
        num_splits: Parts. ADM takes parts of 5,000, ten of 50,000 samples.

    Raises:
        ValueError: Fewer samples than parts, another shape, or logits that are not finite.
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
    return InceptionScore(mean=scores.mean().item(), std=scores.std(correction=0).item())


def precision_recall(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    k: int = 3,
    block_size: int = 1024,
    device: str | torch.device = "cpu",
) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, eqs. 1 and 2).

    Precision is the share of generated samples that lie within the k-th neighbour's distance of some real sample,
    recall the share of real samples within that of some generated one. Both depend on N and M: ADM's ImageNet figures
    are of 10,000 real and 50,000 generated samples.

    Args:
        real: Features [N, D].
        generated: Features [M, D].
        k: Neighbours, not counting the sample itself.
        block_size: Rows of distances at a time; block_size * max(N, M) float64 values are held.
        device: Where distances are computed; it must know float64.

    Raises:
        ValueError: Different features, k out of range, or values that are not finite.
    """
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"Expected the same features of both, got shapes {tuple(real.shape)} and {tuple(generated.shape)}. Make "
            "both with the same extractor."
        )
    fewest = min(len(real), len(generated))
    if not 1 <= k < fewest:
        raise ValueError(f"Expected k from 1 to the samples less one ({fewest - 1}), got {k}. Use more images.")
    real, generated = as_features(real).to(device), as_features(generated).to(device)
    return PrecisionRecall(
        precision=_share_inside(generated, real, k=k, block_size=block_size),
        recall=_share_inside(real, generated, k=k, block_size=block_size),
    )


def _share_inside(points: torch.Tensor, others: torch.Tensor, *, k: int, block_size: int) -> float:
    """Share of the points that lie in the union of balls around the others."""
    # k + 1: each sample is its own nearest.
    radii = torch.cat([torch.cdist(rows, others).kthvalue(k + 1, dim=1).values for rows in others.split(block_size)])
    inside = [(torch.cdist(rows, others) <= radii).any(dim=1) for rows in points.split(block_size)]
    return torch.cat(inside).double().mean().item()
