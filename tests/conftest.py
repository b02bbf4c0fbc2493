# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What every test starts from: one thread and a fixed seed."""

import pytest
import torch


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Makes a test's random numbers independent of the tests that ran before it."""
    torch.manual_seed(0)
