# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .transformer_tread_2d import TREADTransformer2DModel


__all__ = ["TREADTransformer2DModel"]
