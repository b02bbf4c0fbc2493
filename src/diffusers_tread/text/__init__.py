# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Text-to-image pipelines of diffusers as denoisers to train, and what their encoders make of captions."""

from .denoiser import PipelineDenoiser
from .encoding import PromptEncoder


__all__ = ["PipelineDenoiser", "PromptEncoder"]
