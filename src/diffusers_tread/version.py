# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The version of the package, written here and nowhere else."""

__version__ = "0.2.0"
