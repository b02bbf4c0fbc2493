# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Silences two warnings of diffusers: one that repeats for every guider, one about an empty list at every cast."""

import logging


# Logged by the constructor of each guider:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/guiders/guider_utils.py
ONCE = "Guiders are currently an experimental feature"
# Logged by `to(dtype)` for models without such modules, since 0.42:
# https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/modeling_utils.py
NEVER = "that should be kept in float32: []"
LOGGERS = ("diffusers.guiders.guider_utils", "diffusers.models.modeling_utils")


class QuietFilter(logging.Filter):
    """Passes `ONCE` once per process, `NEVER` never, and every other record."""

    was_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if ONCE in text:
            is_first, self.was_said = not self.was_said, True
            return is_first
        return NEVER not in text


_FILTER = QuietFilter()


def quieten_diffusers() -> None:
    """Installs the filter; further calls change nothing."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
