# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .blocks import BLOCK_SPECS, register_block_spec
from .models import MAIN_STACKS, MODEL_SPECS, register_model_spec
from .refused import REFUSED_BLOCKS, REFUSED_MODELS
from .types import Axis, BlockSpec, ModelSpec, Window, find_by_class


__all__ = [
    "Axis",
    "BLOCK_SPECS",
    "BlockSpec",
    "MAIN_STACKS",
    "MODEL_SPECS",
    "ModelSpec",
    "REFUSED_BLOCKS",
    "REFUSED_MODELS",
    "Window",
    "find_by_class",
    "register_block_spec",
    "register_model_spec",
]
