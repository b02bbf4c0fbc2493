# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance and its ratio schedules, path-drop guidance, and a base class for guiders with several branches."""

from .branches import Branch, BranchGuidance, branches_of
from .path_drop_guidance import PathDropGuidance
from .ratio_schedule import RatioSchedule
from .registry import GUIDERS, register_guider
from .sparse_guidance import SparseGuidance


__all__ = [
    "Branch",
    "BranchGuidance",
    "GUIDERS",
    "PathDropGuidance",
    "RatioSchedule",
    "SparseGuidance",
    "branches_of",
    "register_guider",
]
