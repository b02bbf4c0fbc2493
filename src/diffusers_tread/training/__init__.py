# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a training run needs besides the model: checkpoints, averages, its folder, its log."""
