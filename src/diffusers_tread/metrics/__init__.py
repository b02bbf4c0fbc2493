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
from .feature_statistics import FeatureStatistics
from .feature_store import FeatureStore
from .frechet import frechet_distance
from .image_sources import DatasetImages, FolderImages, KeptImages, PipelineImages
from .inception_score import inception_score
from .metric import MeanStd
from .networks import FeatureExtractor, TorchFeatureExtractor, load_feature_extractor
from .precision_recall import precision, recall
from .references import NpzImages, Reference, load_reference, save_statistics
from .results import EvaluationResults, load_results


__all__ = [
    "DatasetImages",
    "EvaluationResults",
    "FeatureExtractor",
    "FeatureStatistics",
    "FeatureStore",
    "FolderImages",
    "KeptImages",
    "METRICS",
    "MeanStd",
    "NpzImages",
    "PipelineImages",
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
    "precision",
    "prepare_reference",
    "recall",
    "save_statistics",
]
