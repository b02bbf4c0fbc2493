# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What examples/make_avatars.py and the demos write down, draw and judge with. It may change without notice."""
