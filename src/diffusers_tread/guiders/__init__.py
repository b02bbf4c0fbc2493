# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .ratio_schedule import RatioSchedule
from .sparse_guidance import SparseGuidance


__all__ = ["RatioSchedule", "SparseGuidance"]
