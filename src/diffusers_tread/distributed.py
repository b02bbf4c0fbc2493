# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs work in the main process and shares its result or error with the others."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_main_process(work: Callable[[], Any], *, only_there: bool = False) -> Any:
    """Calls `work()` in the main process only; all processes call this function together.

    Args:
        work: The function to call.
        only_there: Whether its result stays in the main process; the others then get None.

    Returns:
        The result of `work`, in all processes; it must be picklable.

    Raises:
        ValueError: In all processes, with the same message, if `work` raised one, so that none waits for the others.
        RuntimeError: In the other processes, if `work` raised any other error; the main process raises that error.
    """
    # In the main process.
    result, problem = None, None
    if PartialState().is_main_process:
        try:
            result = work()
        except Exception as error:
            problem = error

    # To all others.
    told = (
        None if only_there else result,
        None if problem is None else (isinstance(problem, ValueError), str(problem)),
    )
    (shared, trouble), *_ = broadcast_object_list([told])

    # Errors, else the result.
    if problem is not None:
        raise problem
    if trouble is not None:
        is_value_error, message = trouble
        raise (ValueError if is_value_error else RuntimeError)(message)
    return result if PartialState().is_main_process else shared
