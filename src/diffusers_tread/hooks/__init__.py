# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .block_specs import BlockSpec, ModelSpec, Window, register_block_spec
from .model_specs import register_model_spec
from .token_routing import apply_token_routing, check_token_routing, compile_blocks, remove_token_routing


__all__ = [
    "BlockSpec",
    "ModelSpec",
    "Window",
    "apply_token_routing",
    "check_token_routing",
    "compile_blocks",
    "register_block_spec",
    "register_model_spec",
    "remove_token_routing",
]
