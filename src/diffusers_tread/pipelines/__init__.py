# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sampling: a class-conditional pipeline, and Sparse Guidance for diffusers pipelines that take no guider."""

from .cfg_layouts import CfgLayout, register_pipeline_layout
from .guided_pipeline import GuidedPipeline
from .pipeline_tread import TREADPipeline


__all__ = ["CfgLayout", "GuidedPipeline", "TREADPipeline", "register_pipeline_layout"]
