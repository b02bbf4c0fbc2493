# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The objectives by their names in a model's config."""

from ..registry import add_entry
from .base import Objective
from .edm import EDMObjective
from .epsilon import EpsilonObjective
from .flow import FlowMatchingObjective
from .jit import JiTObjective


OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(name: str, objective: type[Objective]) -> None:
    """Registers an objective under a name, for model configs, the pipeline and the training script.

    Raises:
        ValueError: Another objective has this name, or the objective has another name.
    """
    if vars(objective).get("name", name) != name:
        raise ValueError(f"Expected an objective without a name, got {objective.name!r}. Register a subclass of it.")
    add_entry(OBJECTIVES, name, objective)
    objective.name = name


def find_objective(name: str) -> type[Objective]:
    """The objective with this name, as in a model's config.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"Expected an objective among {list(OBJECTIVES)}, got {name!r}. One of your own is made known by "
            "register_objective."
        )
    return OBJECTIVES[name]


register_objective("edm", EDMObjective)
register_objective("flow", FlowMatchingObjective)
register_objective("epsilon", EpsilonObjective)
register_objective("jit", JiTObjective)
