# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Lets the tests import the scripts; a preset small enough for tests."""

import sys
from pathlib import Path

import pytest

from diffusers_tread import TREADTransformer2DModel


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def small_s():
    """Makes the preset S a third as wide, with its twelve blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in TREADTransformer2DModel._presets.items():
            if name.startswith("S/"):
                patch.setitem(config, "num_attention_heads", 2)
        yield
