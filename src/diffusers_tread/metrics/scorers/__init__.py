# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Scorers, which rate how well images fit their prompts."""

from .from_file import load_scorer_file
from .registry import SCORERS, load_scorers, register_scorer
from .scorer import LoadedScorer, Scorer


__all__ = ["SCORERS", "LoadedScorer", "Scorer", "load_scorer_file", "load_scorers", "register_scorer"]
