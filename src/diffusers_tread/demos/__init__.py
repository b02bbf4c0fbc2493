# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Captions, drawings and judges for examples/make_avatars.py and the demos. May change without notice."""
