# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn

from diffusers_tread.metrics import TorchFeatureExtractor


def test_a_network_of_one_s_own_is_put_into_evaluation_mode_and_known_by_its_weights_and_settings(noise_images):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 5))
    one = TorchFeatureExtractor(network, name="own", size=2)
    images = noise_images(4, 9, 9)
    outputs = one(images)["features"]
    assert torch.equal(outputs, one(images)["features"]) and not outputs.requires_grad
    other = TorchFeatureExtractor(network, name="own", size=2, mean=(0.5, 0.5, 0.5))
    assert one.fingerprint.startswith("own:") and one.fingerprint != other.fingerprint
    network[2].bias.add_(1)
    assert TorchFeatureExtractor(network, name="own", size=2).fingerprint not in (one.fingerprint, other.fingerprint)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
)
def test_anything_but_8_bit_rgb_images_is_refused(images):
    extractor = TorchFeatureExtractor(nn.Flatten(), name="own", size=2)
    with pytest.raises(ValueError, match=r"Expected uint8 images \[B, 3, H, W\]"):
        extractor(images)


def test_a_network_that_does_not_pool_is_refused(noise_images):
    extractor = TorchFeatureExtractor(nn.Identity(), name="own", size=2)
    with pytest.raises(ValueError, match=r"got \(1, 3, 2, 2\) of own. Use one that pools"):
        extractor(noise_images(1, 4, 4))
