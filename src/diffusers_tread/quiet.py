# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Keeps diffusers from logging the same warning for every guider, and one about an empty list for every cast."""

import logging


# In the constructor of each guider:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/guiders/guider_utils.py
ONCE = "Guiders are currently an experimental feature"
# Of `to(dtype)` of models without such modules, since 0.42:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/modeling_utils.py
NEVER = "that should be kept in float32: []"
LOGGERS = ("diffusers.guiders.guider_utils", "diffusers.models.modeling_utils")


class QuietFilter(logging.Filter):
    """Lets `ONCE` through once in a process, `NEVER` never, all else always."""

    was_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if ONCE in text:
            is_first, self.was_said = not self.was_said, True
            return is_first
        return NEVER not in text


_FILTER = QuietFilter()


def quieten_diffusers() -> None:
    """Sets the filter; a second call changes nothing."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
