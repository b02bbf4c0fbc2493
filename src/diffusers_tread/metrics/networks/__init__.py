# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Networks that turn images into features."""

from .feature_extractor import FeatureExtractor, TorchFeatureExtractor
from .registry import load_feature_extractor


__all__ = ["FeatureExtractor", "TorchFeatureExtractor", "load_feature_extractor"]
