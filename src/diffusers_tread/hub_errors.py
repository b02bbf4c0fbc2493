# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The errors that libraries raise when the Hub is unreachable or refuses a request, and advice for the user."""

from huggingface_hub.errors import HfHubHTTPError


LOST: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
"""Errors of requests are OSErrors; those of httpx share a base class with HfHubHTTPError."""

ADVICE = (
    "Check the name, the network and, for what is gated or private, `hf auth login` or HF_TOKEN. Without a connection "
    "only what was downloaded before is found."
)
