# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs work in the main process and shares its result or error with the others."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_main_process(work: Callable[[], Any]) -> Any:
    """Calls `work()` in the main process alone; all processes call this together.

    Returns:
        What it returned, in all processes; it must be picklable.

    Raises:
        ValueError: If it raised one, with the same message, in all processes, so that none waits for the others.
    """
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = work()
        except ValueError as error:
            answer[1] = str(error)
    result, problem = broadcast_object_list(answer)
    if problem is not None:
        raise ValueError(problem)
    return result
