# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Where a route starts and ends, which tokens are kept, and the stack of blocks that the others skip."""

from .fusion import RouteFusion, make_fusions
from .ops import put_tokens, take_tokens
from .refusals import check_can_drop_path, check_can_fuse, check_can_route, has_cache, hook_names
from .route import TokenRoute, default_route, num_kept_tokens, resolve_routes
from .router import RoutingCall, TokenRouter, draw_routing_seed, get_token_router, token_routing
from .stack import RoutedStack, StackOutput


__all__ = [
    "RouteFusion",
    "RoutedStack",
    "RoutingCall",
    "StackOutput",
    "TokenRoute",
    "TokenRouter",
    "check_can_drop_path",
    "check_can_fuse",
    "check_can_route",
    "default_route",
    "draw_routing_seed",
    "get_token_router",
    "has_cache",
    "hook_names",
    "make_fusions",
    "num_kept_tokens",
    "put_tokens",
    "resolve_routes",
    "take_tokens",
    "token_routing",
]
