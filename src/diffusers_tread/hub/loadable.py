# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Where diffusers finds the classes of this package and those registered with it, and how to load them.

diffusers looks for a component's class in the module that a configuration names, and for the base class that tells it
how to load the component in the same module, by name.
"""

from typing import Any

from diffusers import BaseGuidance, ModelMixin, SchedulerMixin

from ..guiders import GUIDERS
from ..models import DENOISERS
from ..schedulers import SCHEDULERS


__all__ = ["BaseGuidance", "ModelMixin", "SchedulerMixin", "package_classes"]


def package_classes() -> dict[str, type]:
    """The components of which a repository may hold the code, by class name."""
    return {**DENOISERS, **SCHEDULERS, **GUIDERS}


def __getattr__(name: str) -> Any:
    try:
        return package_classes()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
