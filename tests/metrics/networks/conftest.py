# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images for the networks, and PIL's resizing to compare theirs with."""

import numpy as np
import PIL.Image
import pytest
import torch


@pytest.fixture(scope="session")
def noise_images():
    def make(count, height, width):
        pixels = np.random.RandomState(0).randint(0, 256, (count, 3, height, width), dtype=np.uint8)
        return torch.from_numpy(pixels)

    return make


@pytest.fixture(scope="session")
def resize_with_pil():
    def resize(images, size):
        """Each channel in float with PIL's antialiased bicubic filter, not rounded; values 0..255."""
        channels = [
            PIL.Image.fromarray(channel.astype(np.float32)).resize((size, size), PIL.Image.Resampling.BICUBIC)
            for channel in images.flatten(0, 1).numpy()
        ]
        return torch.from_numpy(np.stack(channels)).clamp(0, 255).unflatten(0, (-1, 3))

    return resize
