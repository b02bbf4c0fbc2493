# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import pytest
import safetensors.torch
import torch

from diffusers_tread.metrics import load_feature_extractor


def test_timm_s_pooled_features(tmp_path, noise_images):
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
