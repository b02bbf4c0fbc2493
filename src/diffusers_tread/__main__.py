# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""`python -m diffusers_tread` and `accelerate launch -m diffusers_tread`: the command line of cli.py."""

import sys

from .cli import command


if __name__ == "__main__":
    sys.exit(command())
