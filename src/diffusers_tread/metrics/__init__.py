# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""FID and its companions: metrics, the networks whose features they compare, references and evaluation."""

from .evaluation import evaluate_images, evaluate_pipeline
from .feature_statistics import FeatureStatistics
from .feature_store import FeatureStore
from .frechet import frechet_distance
from .image_sources import DatasetImages, FolderImages, ImageSource, KeptImages
from .inception_score import inception_score
from .metric import MeanStd, Metric
from .networks import FeatureExtractor, TorchFeatureExtractor, load_feature_extractor
from .npz import NpzImages, NpzReference, load_reference, save_statistics
from .pipeline_images import PipelineImages
from .precision_recall import precision, recall
from .reference import PreparedReference, prepare_reference
from .registry import METRICS, check_metrics, possible_metrics, register_metric
from .results import EvaluationResults, load_results


__all__ = [
    "DatasetImages",
    "EvaluationResults",
    "FeatureExtractor",
    "FeatureStatistics",
    "FeatureStore",
    "FolderImages",
    "ImageSource",
    "KeptImages",
    "METRICS",
    "MeanStd",
    "Metric",
    "NpzImages",
    "NpzReference",
    "PipelineImages",
    "PreparedReference",
    "TorchFeatureExtractor",
    "check_metrics",
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
    "register_metric",
    "save_statistics",
]
