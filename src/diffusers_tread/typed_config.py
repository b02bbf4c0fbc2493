# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""diffusers' `register_to_config`, typed so that type checkers keep the arguments of a decorated constructor."""

from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    Init = TypeVar("Init")

    def register_to_config(init: Init) -> Init: ...

else:
    from diffusers.configuration_utils import register_to_config  # noqa: F401
