# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Lets the tests import the examples and the helpers beside them."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples")]
