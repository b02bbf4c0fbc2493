# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Text-to-image pipelines of diffusers as denoisers to train, and the encoding of captions."""

from .building import PIPELINES, load_pipeline, make_transformer, register_text_pipeline, save_pipeline
from .denoiser import PipelineDenoiser
from .encoding import LENGTHS, PromptEncoder, text_identity


__all__ = [
    "LENGTHS",
    "PIPELINES",
    "PipelineDenoiser",
    "PromptEncoder",
    "load_pipeline",
    "make_transformer",
    "register_text_pipeline",
    "save_pipeline",
    "text_identity",
]
