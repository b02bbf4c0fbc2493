# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from diffusers_tread.data import (
    LatentsInfo,
    encode_images,
    encode_moments,
    latent_codec,
    latents_from_moments,
)


INFO = LatentsInfo(
    kind="moments", dtype="float16", latent_channels=4, latent_size=8, resolution=8, scaling_factor=0.3,
    shift_factor=0.2, vae={}, source={}, id2label={0: "ant", 1: "bee"}, num_samples=2,
    shards=({"file": "data/a.arrow", "num_samples": 2, "size": 9, "sha256": "0" * 64},), unreadable=("image 7",),
)  # fmt: skip


def test_autoencoders_without_a_posterior_encode_too():
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=0.5,
    ).eval()  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(encode_images(tiny, images), tiny.encode(images).latents * 0.5)

    deep = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41,
    ).eval()  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(encode_images(deep, images), deep.encode(images).latent * 0.41)


def test_a_posterior_is_sampled_shifted_and_scaled_at_once_or_through_stored_moments():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.3, shift_factor=0.2).eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    moments = encode_moments(vae, images)
    with torch.no_grad():
        mean, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
    torch.testing.assert_close(moments, torch.cat([mean, (0.5 * logvar).exp()], dim=1))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    expected = (mean + (0.5 * logvar).exp() * noise - 0.2) * 0.3
    for encode, stage in ((encode_images, (vae, images)), (latents_from_moments, (moments, INFO))):
        torch.testing.assert_close(encode(*stage, generator=torch.Generator().manual_seed(1)), expected)
    assert latent_codec(vae) == INFO.codec


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_of_a_stored_posterior_have_its_mean_and_deviation(dtype):
    mean, std = torch.randn(1, 4, 2, 2), torch.rand(1, 4, 2, 2) + 0.1
    moments = torch.cat([mean, std], dim=1).to(dtype).expand(20_000, -1, -1, -1)
    latents = latents_from_moments(moments, INFO, generator=torch.Generator().manual_seed(0))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.mean(0), (mean[0] - 0.2) * 0.3, atol=0.01, rtol=0)
    torch.testing.assert_close(latents.std(0), std[0] * 0.3, atol=0.01, rtol=0)


def test_stored_latents_are_only_shifted_and_scaled():
    values = torch.randn(2, 4, 8, 8).half()
    latents = latents_from_moments(values, dataclasses.replace(INFO, kind="latents"))
    assert torch.equal(latents, (values.float() - 0.2) * 0.3)


def test_latents_json_comes_back_the_same_and_others_are_refused(tmp_path):
    (tmp_path / "latents.json").write_text(json.dumps(INFO.to_dict()))
    assert LatentsInfo.load(tmp_path) == INFO
    for change in ({"format_version": 2}, {"kind": "means"}, {"dtype": "int8"}, {"num_samples": 0}, {"more": 1}):
        (tmp_path / "latents.json").write_text(json.dumps(INFO.to_dict() | change))
        with pytest.raises(ValueError, match="Expected a folder of latents with a latents.json"):
            LatentsInfo.load(tmp_path)
    with pytest.raises(ValueError, match="Expected a folder of latents with a latents.json"):
        LatentsInfo.load(tmp_path / "nowhere")


def test_classes_of_the_same_name_stay_apart():
    pytest.importorskip("datasets")
    names = dataclasses.replace(INFO, id2label={0: "crane", 1: "ant", 2: "crane"}).features()["label"].names
    assert names == ["0 crane", "1 ant", "2 crane"]
    assert INFO.features()["label"].names == ["ant", "bee"]
