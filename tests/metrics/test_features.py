# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import hashlib
import importlib.util
import json
import pickle
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from torch import nn

from diffusers_tread.metrics import TorchFeatureExtractor, load_feature_extractor
from diffusers_tread.metrics import inception as inception_module


def noise_images(count, height, width, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (count, 3, height, width), dtype=np.uint8))


def resize_with_pil(images, size):
    """Each channel in float with PIL's antialiased bicubic filter, not rounded; values 0..255."""
    channels = [
        PIL.Image.fromarray(channel.astype(np.float32)).resize((size, size), PIL.Image.Resampling.BICUBIC)
        for channel in images.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255).unflatten(0, (-1, 3))


# The Inception of torch-fidelity.


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


def test_inception_is_torch_fidelity_s_network(inception):
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


def test_weights_of_another_network_are_refused(torch_fidelity, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="Expected weights of torch-fidelity's Inception in .*weights.safetensors"):
        load_feature_extractor("inception", weights=path)


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(torch_fidelity, tmp_path, capfd, write):
    path = tmp_path / "weights.pth"
    write({"fc.bias": Payload()}, path)
    with pytest.raises(ValueError, match="Expected a state dict of tensors in .*weights.pth"):
        load_feature_extractor("inception", weights=path)
    assert "this must not run" not in capfd.readouterr().out


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    weights = tmp_path / "inception-2015-12-05.pt"
    weights.touch()
    for module, spec in (
        ("torch_fidelity.feature_extractor_inceptionv3", "inception"),
        ("cleanfid.resize", "clean-fid:clean"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r'pip install "diffusers-tread\[fid\]"'):
            load_feature_extractor(spec, weights=weights)


# The TorchScript file of clean-fid.


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
def test_clean_fid_resizes_as_its_mode_says(torchscript):
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
    monkeypatch.setitem(inception_module.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
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


# Transformers, timm and any other network.


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small DINOv2 with random weights, and its folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model, folder


@torch.no_grad()
@pytest.mark.parametrize("size", [(28, 28), (60, 60), (40, 100), (8, 8)])
def test_dinov2_sees_the_whole_resized_image_and_gives_its_class_token(dinov2, size):
    model, folder = dinov2
    images = noise_images(2, *size)
    pixels = resize_with_pil(images, 28) / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    expected = model(pixel_values=(pixels - mean) / std).pooler_output
    extractor = load_feature_extractor(f"transformers:{folder}")
    features = extractor(images)["features"]
    assert features.dtype == torch.float32 and features.shape == (2, 16)
    torch.testing.assert_close(features, expected, atol=2e-4, rtol=1e-4)


def test_a_copy_of_a_model_elsewhere_has_the_same_fingerprint(dinov2, tmp_path):
    _, folder = dinov2
    copy = shutil.copytree(folder, tmp_path / "copy")
    one, other = (load_feature_extractor(f"transformers:{path}") for path in (folder, copy))
    assert one.name != other.name and one.fingerprint == other.fingerprint


def test_a_folder_without_a_usable_model_is_refused(dinov2, tmp_path):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="Expected a model with safetensors and a preprocessor_config.json"):
        load_feature_extractor(f"transformers:{tmp_path}")

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((dinov2[1] / "preprocessor_config.json").read_bytes())
    with pytest.raises(ValueError, match="with a class token, got ResNetModel"):
        load_feature_extractor(f"transformers:{tmp_path}")

    weights = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="Expected no weights beside a model folder"):
        load_feature_extractor(f"transformers:{tmp_path}", weights=weights)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Expected a model with safetensors"):
        load_feature_extractor(f"transformers:{tmp_path}")


def test_timm_s_pooled_features(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    images = noise_images(1, size, size)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    expected = model.forward_features((images / 255 - mean) / std).mean(dim=(2, 3))
    extractor = load_feature_extractor("timm:resnet10t", weights=weights)
    torch.testing.assert_close(extractor(images)["features"], expected)

    safetensors.torch.save_file({"head.weight": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match="Expected the weights of timm:resnet10t"):
        load_feature_extractor("timm:resnet10t", weights=weights)
    with pytest.raises(ValueError, match="Expected a timm model"):
        load_feature_extractor("timm:no_such_model")


def test_a_network_of_one_s_own_is_put_into_evaluation_mode_and_known_by_its_weights_and_settings():
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


def test_a_network_that_does_not_pool_is_refused():
    extractor = TorchFeatureExtractor(nn.Identity(), name="own", size=2)
    with pytest.raises(ValueError, match=r"got \(1, 3, 2, 2\) of own. Use one that pools"):
        extractor(noise_images(1, 4, 4))


@pytest.mark.parametrize("spec", ["", "vgg", "inception:v3", "timm", "timm:", "transformers:", "clean-fid"])
def test_an_unknown_spec_is_refused(spec):
    with pytest.raises(ValueError, match='Expected "inception", "clean-fid:clean"'):
        load_feature_extractor(spec)


def test_an_unknown_mode_of_clean_fid_and_missing_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match='Expected "clean" or "legacy_tensorflow" of clean-fid'):
        load_feature_extractor("clean-fid:legacy_pytorch")
    with pytest.raises(ValueError, match="Expected a file with the weights of inception, got no file"):
        load_feature_extractor("inception", weights=tmp_path / "missing.pth")
