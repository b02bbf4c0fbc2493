# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs work in the main process and shares its result or error with the others."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_main_process(work: Callable[[], Any], *, only_there: bool = False) -> Any:
    """Calls `work()` in the main process alone; all processes call this together.

    Args:
        work: What to do.
        only_there: Whether what it returns stays in the main process; the others get None.

    Returns:
        What it returned, in all processes; it must be picklable.

    Raises:
        ValueError: If it raised one, with the same message, in all processes, so that none waits for the others.
        RuntimeError: Likewise in the others if it raised anything else, which the main process raises as it is.
    """
    result, problem = None, None
    if PartialState().is_main_process:
        try:
            result = work()
        except Exception as error:
            problem = error
    told = (
        None if only_there else result,
        None if problem is None else (isinstance(problem, ValueError), str(problem)),
    )
    (shared, trouble), *_ = broadcast_object_list([told])
    if problem is not None:
        raise problem
    if trouble is not None:
        is_value_error, message = trouble
        raise (ValueError if is_value_error else RuntimeError)(message)
    return result if PartialState().is_main_process else shared
