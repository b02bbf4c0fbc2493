# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""JSON configs of training scripts."""
