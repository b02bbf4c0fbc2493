# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""FID and its companions: statistics, scores, feature extractors, references."""

from .evaluation import (
    METRICS,
    PreparedReference,
    check_metrics,
    describe_extractor,
    evaluate_images,
    evaluate_pipeline,
    possible_metrics,
    prepare_reference,
)
from .feature_store import FeatureStore
from .image_sources import DatasetImages, FolderImages, KeptImages, PipelineImages
from .networks import FeatureExtractor, TorchFeatureExtractor, load_feature_extractor
from .references import NpzImages, Reference, load_reference, save_statistics
from .results import EvaluationResults, load_results
from .scores import InceptionScore, PrecisionRecall, inception_score, precision_recall
from .statistics import FeatureStatistics, frechet_distance


__all__ = [
    "DatasetImages",
    "EvaluationResults",
    "FeatureExtractor",
    "FeatureStatistics",
    "FeatureStore",
    "FolderImages",
    "InceptionScore",
    "KeptImages",
    "METRICS",
    "NpzImages",
    "PipelineImages",
    "PrecisionRecall",
    "PreparedReference",
    "Reference",
    "TorchFeatureExtractor",
    "check_metrics",
    "describe_extractor",
    "evaluate_images",
    "evaluate_pipeline",
    "frechet_distance",
    "inception_score",
    "load_feature_extractor",
    "load_reference",
    "load_results",
    "possible_metrics",
    "precision_recall",
    "prepare_reference",
    "save_statistics",
]
