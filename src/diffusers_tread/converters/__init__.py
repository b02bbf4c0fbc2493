# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Converts other projects' diffusion transformers into pipelines of this package, and ours into DiT's layout.

Command line: `python -m diffusers_tread.converters`.
"""

from .checkpoints import convert_checkpoint
from .diffusers_dit import convert_diffusers_dit
from .export_dit import export_dit


__all__ = ["convert_checkpoint", "convert_diffusers_dit", "export_dit"]
