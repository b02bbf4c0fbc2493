# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import pytest
import torch

from diffusers_tread.metrics import load_feature_extractor


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
def test_dinov2_sees_the_whole_resized_image_and_gives_its_class_token(dinov2, size, noise_images, resize_with_pil):
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
