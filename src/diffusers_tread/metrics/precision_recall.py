# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Improved precision and recall (arXiv 1904.06991).

Both depend on the numbers of samples: ADM's ImageNet figures compare 50,000 samples with 10,000 reference images.

Shapes: N samples, M reference images, D features.
"""

import torch

from .metric import Metric, as_features


def precision(samples: torch.Tensor, reference: torch.Tensor, *, k: int = 3, block_size: int = 1024) -> float:
    """Computes the share of samples that are in the manifold of the reference (eqs. 1 and 2).

    The manifold is the union of balls around the reference's features, each with the distance to the k-th neighbour
    as its radius. Distances are computed in float64 on the device of the features.

    Args:
        samples: Features [N, D].
        reference: Features [M, D], with M > k.
        k: Number of neighbours, not counting the image itself.
        block_size: Rows of distances held at a time: block_size * M values.

    Raises:
        ValueError: k is out of range, or the features have another shape or are not finite.
    """
    if not 1 <= k < len(reference):
        raise ValueError(f"Expected k from 1 to the images less one ({len(reference) - 1}), got {k}. Use more images.")
    samples, reference = (as_features(features, device=features.device) for features in (samples, reference))

    # The radius of each ball. k + 1, because each image is its own nearest neighbour.
    blocks = reference.split(block_size)
    radii = torch.cat([torch.cdist(rows, reference).kthvalue(k + 1, dim=1).values for rows in blocks])  # M

    # The samples that are in any ball.
    blocks = samples.split(block_size)
    inside = torch.cat([(torch.cdist(rows, reference) <= radii).any(dim=1) for rows in blocks])  # N
    return inside.double().mean().item()


def recall(samples: torch.Tensor, reference: torch.Tensor, *, k: int = 3, block_size: int = 1024) -> float:
    """Computes the share of the reference that is in the manifold of the samples: `precision` with both swapped."""
    return precision(reference, samples, k=k, block_size=block_size)


# At least four images: one and its three neighbours.
PRECISION = Metric(
    label="Precision", compute=precision, takes="features", output="features", higher_is_better=True, min_samples=4
)
RECALL = Metric(
    label="Recall", compute=recall, takes="features", output="features", higher_is_better=True, min_samples=4
)
