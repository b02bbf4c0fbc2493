# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""FID and its companions: statistics, scores, feature extractors, references."""

from .features import FeatureExtractor, TorchFeatureExtractor, load_feature_extractor
from .references import NpzImages, Reference, load_reference, save_statistics
from .scores import InceptionScore, PrecisionRecall, inception_score, precision_recall
from .statistics import FeatureStatistics, frechet_distance


__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "InceptionScore",
    "NpzImages",
    "PrecisionRecall",
    "Reference",
    "TorchFeatureExtractor",
    "frechet_distance",
    "inception_score",
    "load_feature_extractor",
    "load_reference",
    "precision_recall",
    "save_statistics",
]
