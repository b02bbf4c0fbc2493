# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import sys

import pytest
import safetensors.torch
import torch

from diffusers_tread.metrics import load_feature_extractor
from diffusers_tread.metrics.networks.inception import _import_network


@pytest.fixture(scope="module")
def inception(torch_fidelity, tmp_path_factory):
    """torch-fidelity's network with random weights, and the file that holds them."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_is_torch_fidelity_s_network(inception, noise_images):
    network, path = inception
    extractor = load_feature_extractor("inception", weights=str(path))
    images = noise_images(2, 32, 40)
    mixed_6c = []
    handle = network.Mixed_6c.register_forward_hook(lambda module, args, output: mixed_6c.append(output))
    features, logits = network(images)
    handle.remove()

    outputs = extractor(images)
    assert set(outputs) == set(extractor.outputs) == {"features", "spatial", "logits"}
    assert torch.equal(outputs["features"], features) and features.shape == (2, 2048)
    assert torch.equal(outputs["logits"], logits) and logits.shape == (2, 1008)
    torch.testing.assert_close(logits, features @ network.fc.weight.T)  # no bias

    # sFID: seven channels of the 1x1 branch after mixed_5 (Mixed_6c), position by position.
    branch = network.Mixed_6d.branch1x1
    weight = branch.conv.weight[:7, :, 0, 0]
    scale = branch.bn.weight[:7] / (branch.bn.running_var[:7] + branch.bn.eps).sqrt()
    shift = branch.bn.bias[:7] - branch.bn.running_mean[:7] * scale
    spatial = torch.einsum("nchw,kc->nhwk", mixed_6c[0], weight) * scale + shift
    torch.testing.assert_close(outputs["spatial"], spatial.clamp(min=0).reshape(2, 2023))
    assert outputs["spatial"].std() > 0

    # The fingerprint knows the weights, not the file's format.
    safe = path.with_suffix(".safetensors")
    safetensors.torch.save_file(network.state_dict(), safe)
    assert load_feature_extractor("inception", weights=safe).fingerprint == extractor.fingerprint


def test_the_network_is_imported_without_torchvision_and_leaves_the_library_to_others(torch_fidelity, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    module = _import_network()
    assert module.FeatureExtractorInceptionV3.__name__ == "FeatureExtractorInceptionV3"
    assert not [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]

    monkeypatch.setattr("diffusers_tread.metrics.networks.inception.PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="Do `pip install --no-deps clean-fid torch-fidelity`"):
        _import_network()


def test_weights_of_another_network_are_refused(torch_fidelity, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="Expected weights of torch-fidelity's Inception in .*weights.safetensors"):
        load_feature_extractor("inception", weights=path)
