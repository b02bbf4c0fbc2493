# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""diffusers' `register_to_config`, which has no types: for type checkers a constructor keeps its arguments."""

from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    Init = TypeVar("Init")

    def register_to_config(init: Init) -> Init: ...

else:
    from diffusers.configuration_utils import register_to_config  # noqa: F401
