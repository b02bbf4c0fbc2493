# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Training objectives."""

from .objectives import EDMObjective, FlowMatchingObjective


__all__ = ["EDMObjective", "FlowMatchingObjective"]
