# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What libraries raise when the Hub cannot be reached or refuses, and what to do then."""

from huggingface_hub.errors import HfHubHTTPError


LOST: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
"""Errors of requests are OSErrors; those of httpx derive from a base that HfHubHTTPError has in common with it."""

ADVICE = (
    "Check the name, the network and, for what is gated or private, `hf auth login` or HF_TOKEN. Without a connection "
    "only what was downloaded before is found."
)
