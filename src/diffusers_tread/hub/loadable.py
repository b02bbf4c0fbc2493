# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The module in which diffusers finds the classes of this package and those registered with it.

diffusers looks up a component's class by name in the module that a configuration names. In the same module it looks up
the base class that tells how to load the component.
"""

from typing import Any

from diffusers import BaseGuidance, ModelMixin, SchedulerMixin

from ..guiders import GUIDERS
from ..models import DENOISERS
from ..schedulers import SCHEDULERS


__all__ = ["BaseGuidance", "ModelMixin", "SchedulerMixin", "package_classes"]


def package_classes() -> dict[str, type]:
    """The component classes of this package and those registered with it, by class name."""
    return {**DENOISERS, **SCHEDULERS, **GUIDERS}


def __getattr__(name: str) -> Any:
    try:
        return package_classes()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
