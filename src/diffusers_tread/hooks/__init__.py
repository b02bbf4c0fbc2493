# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Token routing on diffusers transformers, and on your own, without editing them."""

from .apply import apply_token_routing, compile_blocks, main_stacks, remove_token_routing
from .check import check_token_routing
from .specs import BlockSpec, ModelSpec, Window, register_block_spec, register_model_spec


__all__ = [
    "BlockSpec",
    "ModelSpec",
    "Window",
    "apply_token_routing",
    "check_token_routing",
    "compile_blocks",
    "main_stacks",
    "register_block_spec",
    "register_model_spec",
    "remove_token_routing",
]
