# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import hashlib
import importlib.util

import pytest
import torch
from torch import nn

from diffusers_tread.metrics import load_feature_extractor
from diffusers_tread.metrics.networks import weights as weights_module


class Layers(nn.Module):
    """2,048 values of an image, at any size."""

    def __init__(self):
        super().__init__()
        self.mix, self.pool = nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d((32, 64))

    def forward(self, x):
        return self.pool(self.mix(x)).flatten(1)


class TorchScriptNetwork(nn.Module):
    """The calls that clean-fid makes of inception-2015-12-05.pt."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = False):
        x = nn.functional.interpolate(x, size=(299, 299), mode="bilinear")
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    if importlib.util.find_spec("cleanfid") is None:
        pytest.skip("clean-fid is not installed")
    torch.manual_seed(0)
    network = TorchScriptNetwork()
    path = tmp_path_factory.mktemp("torchscript") / "inception-2015-12-05.pt"
    torch.jit.script(network).save(str(path))
    return network, path


@torch.no_grad()
def test_clean_fid_resizes_as_its_mode_says(torchscript, noise_images, resize_with_pil):
    network, path = torchscript
    images = noise_images(3, 50, 64)
    clean = load_feature_extractor("clean-fid:clean", weights=path)
    legacy = load_feature_extractor("clean-fid:legacy_tensorflow", weights=path)
    assert clean.outputs == legacy.outputs == ("features",)
    assert clean.fingerprint != legacy.fingerprint

    expected = network.layers((resize_with_pil(images, 299) - 128) / 128)
    torch.testing.assert_close(clean(images)["features"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(legacy(images)["features"], network(images.float()))
    assert (clean(images)["features"] - legacy(images)["features"]).abs().max() > 1e-3


def test_a_download_is_kept_for_the_next_time_and_one_that_fails_leaves_nothing(torchscript, tmp_path, monkeypatch):
    _, path = torchscript
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    missing = tmp_path / "missing" / path.name
    for url, reason in ((missing, "No such file"), (path, "invalid hash value")):
        monkeypatch.setattr("cleanfid.downloads_helper.inception_url", url.as_uri())
        with pytest.raises(ValueError, match=f"Expected to download file:.*{reason}.*give the file as weights"):
            load_feature_extractor("clean-fid:clean")
        assert not any(file.is_file() for file in tmp_path.rglob("*"))

    expected = load_feature_extractor("clean-fid:clean", weights=path).fingerprint
    monkeypatch.setitem(weights_module.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_feature_extractor("clean-fid:clean").fingerprint == expected
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", missing.as_uri())
    assert load_feature_extractor("clean-fid:clean").fingerprint == expected


def test_a_file_that_is_not_clean_fid_s_network_is_refused(torchscript, tmp_path):
    wrong = tmp_path / "inception-2015-12-05.pt"
    wrong.write_bytes(b"not TorchScript")
    with pytest.raises(ValueError, match="Expected clean-fid's TorchScript network"):
        load_feature_extractor("clean-fid:clean", weights=wrong)
    renamed = wrong.rename(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="Expected a file named inception-2015-12-05.pt"):
        load_feature_extractor("clean-fid:clean", weights=renamed)
