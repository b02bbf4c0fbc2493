# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""FID and related metrics, the networks whose features they compare, references and evaluation."""

from .evaluation import evaluate_images, evaluate_pipeline
from .feature_statistics import FeatureStatistics
from .feature_store import FeatureStore
from .frechet import frechet_distance
from .image_sources import DatasetImages, FolderImages, ImageSource, KeptImages
from .inception_score import inception_score
from .metric import MeanError, MeanStd, Metric
from .networks import FeatureExtractor, TorchFeatureExtractor, load_feature_extractor
from .npz import NpzImages, NpzReference, load_reference, save_statistics
from .pipeline_images import PipelineImages
from .precision_recall import precision, recall
from .prompt_images import PromptImages
from .prompts import load_dataset_prompts, read_prompts
from .reference import PreparedReference, prepare_reference
from .registry import METRICS, check_metrics, is_higher_better, possible_metrics, register_metric
from .results import EvaluationResults, load_results
from .scorers import SCORERS, LoadedScorer, load_scorer_file, load_scorers, register_scorer


__all__ = [
    "DatasetImages",
    "EvaluationResults",
    "FeatureExtractor",
    "FeatureStatistics",
    "FeatureStore",
    "FolderImages",
    "ImageSource",
    "KeptImages",
    "LoadedScorer",
    "METRICS",
    "MeanError",
    "MeanStd",
    "Metric",
    "NpzImages",
    "NpzReference",
    "PipelineImages",
    "PreparedReference",
    "PromptImages",
    "SCORERS",
    "TorchFeatureExtractor",
    "check_metrics",
    "evaluate_images",
    "evaluate_pipeline",
    "frechet_distance",
    "inception_score",
    "is_higher_better",
    "load_dataset_prompts",
    "load_feature_extractor",
    "load_reference",
    "load_results",
    "load_scorer_file",
    "load_scorers",
    "possible_metrics",
    "precision",
    "prepare_reference",
    "read_prompts",
    "recall",
    "register_metric",
    "register_scorer",
    "save_statistics",
]
