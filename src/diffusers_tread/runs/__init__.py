# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a run needs besides the model: its folder, checkpoints, averages, log, and how it is stopped."""
