# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Lets these tests import the tiny models of others."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("hooks", "models")]
