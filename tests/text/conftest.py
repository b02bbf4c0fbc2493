# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Lets the tests of this folder import the tiny pipelines of those of the hooks."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))
