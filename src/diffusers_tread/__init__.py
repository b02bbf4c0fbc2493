# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .models import TREADTransformer2DModel
from .routing import TokenRoute, TokenRouter, default_route, get_token_router, token_routing
from .version import __version__


__all__ = [
    "TREADTransformer2DModel",
    "TokenRoute",
    "TokenRouter",
    "default_route",
    "get_token_router",
    "token_routing",
    "__version__",
]
