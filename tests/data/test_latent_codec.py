# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Latents of every kind of VAE: as the pipelines of diffusers normalise them, and back."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from diffusers_tread import TREADPipeline, TREADTransformer2DModel
from diffusers_tread.data import (
    LatentCodec,
    LatentsInfo,
    check_vae,
    decode_latents,
    encode_images,
    encode_moments,
    latent_codec,
    latents_from_moments,
)
from diffusers_tread.data.latents.codec import latent_channels, spatial_compression
from diffusers_tread.objectives import find_objective


sys.path.insert(0, str(Path(__file__).parent))
from tiny_vaes import KINDS, MEAN, STD, make_vae  # noqa: E402


IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


def seeded():
    return torch.Generator().manual_seed(3)


def by_pipeline(kind, vae):
    """What the code of diffusers makes of `IMAGES`, with noise of `seeded` where it draws any."""
    if kind == "flux2":
        pipe = SimpleNamespace(vae=vae, _patchify_latents=diffusers.Flux2Pipeline._patchify_latents)
        return diffusers.Flux2Pipeline._encode_vae_image(pipe, IMAGES, None)
    if kind == "flux":
        return diffusers.FluxImg2ImgPipeline._encode_vae_image(SimpleNamespace(vae=vae), IMAGES, seeded())
    if kind == "qwen":
        encode = diffusers.QwenImageImg2ImgPipeline._encode_vae_image
        return encode(SimpleNamespace(vae=vae), IMAGES.unsqueeze(2), seeded())[:, :, 0]
    if kind == "wan":
        scheduler = SimpleNamespace(add_noise=lambda latents, noise, timestep: latents)
        pipe = SimpleNamespace(vae=vae, scheduler=scheduler, vae_scale_factor_temporal=4, vae_scale_factor_spatial=2)
        prepare = diffusers.WanVideoToVideoPipeline.prepare_latents
        return prepare(pipe, IMAGES.unsqueeze(2), 3, 4, 16, 16, torch.float32, torch.device("cpu"))[:, :, 0]
    if kind in ("sd", "sdxl"):
        prepare = diffusers.StableDiffusionXLImg2ImgPipeline.prepare_latents
        options = {"dtype": torch.float32, "device": torch.device("cpu"), "generator": seeded(), "add_noise": False}
        return prepare(SimpleNamespace(vae=vae), IMAGES, None, 3, 1, **options)
    if kind == "ltx":
        normalize = diffusers.LTXImageToVideoPipeline._normalize_latents
        latents = vae.encode(IMAGES.unsqueeze(2)).latent_dist.mode()
        return normalize(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)[:, :, 0]
    if kind == "rae":
        return vae.encode((IMAGES + 1) / 2).latent
    return (vae.encode(IMAGES).latent if kind == "dc" else vae.encode(IMAGES).latents) * vae.config.scaling_factor


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_diffusers_pipeline(kind):
    vae = make_vae(kind)
    if kind in ("flux2", "wan", "ltx"):  # their pipelines take the mean
        got = latent_codec(vae).normalize(encode_moments(vae, IMAGES).chunk(2, dim=1)[0])
    else:
        got = encode_images(vae, IMAGES, generator=seeded())
    expected = by_pipeline(kind, vae)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.shape[1:] == (latent_channels(vae), *[16 // spatial_compression(vae)] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_vae_its_own_latents_back(kind):
    """What arrives at the VAE's decoder is what its encoder made, whatever lies between."""
    vae = make_vae(kind)
    moments = encode_moments(vae, IMAGES)
    mean = moments.chunk(2, dim=1)[0] if moments.shape[1] == 2 * latent_channels(vae) else moments
    images = decode_latents(vae, latent_codec(vae).normalize(mean))

    inputs = IMAGES.unsqueeze(2) if kind in ("wan", "qwen", "ltx") else IMAGES
    encoded = vae.encode((inputs + 1) / 2 if kind == "rae" else inputs)
    raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.to_tuple()[0]
    expected = vae.decode(raw).sample
    expected = expected[:, :, 0] if expected.ndim == 5 else expected
    expected = expected * 2 - 1 if kind == "rae" else expected
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert images.shape == IMAGES.shape


def describe(vae, kind="moments", **changes):
    channels, size = latent_channels(vae), 16 // spatial_compression(vae)
    return LatentsInfo(
        kind=kind, dtype="float32", latent_channels=channels, latent_size=size, resolution=16, vae={}, source={},
        id2label={0: "ant"}, num_samples=3, **dataclasses.asdict(latent_codec(vae)) | changes,
        shards=({"file": "data/a.arrow", "num_samples": 3, "size": 1, "sha256": "0" * 64},),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_stored_moments_train_as_images_do(kind, tmp_path):
    """The codec survives latents.json, to the bit."""
    vae = make_vae(kind)
    stored, channels, size = check_vae(vae, 16)
    info = describe(vae, stored)
    (tmp_path / "latents.json").write_text(json.dumps(info.to_dict()))
    loaded = LatentsInfo.load(tmp_path)
    assert loaded == info and loaded.codec == latent_codec(vae)
    assert (channels, size) == (info.latent_channels, info.latent_size)
    latents = latents_from_moments(encode_moments(vae, IMAGES), loaded, generator=seeded())
    assert torch.equal(latents, encode_images(vae, IMAGES, generator=seeded()))


@pytest.mark.parametrize("kind", ["sdxl", "flux2", "wan", "rae"])
def test_the_pipeline_decodes_through_the_same_codec(kind):
    vae = make_vae(kind)
    size = 16 // spatial_compression(vae)
    model = TREADTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=2, sample_size=size, patch_size=2, num_classes=2,
        in_channels=latent_channels(vae), routes=None, objective="edm",
    )  # fmt: skip
    pipe = TREADPipeline(model, find_objective("edm")().scheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    make = {"class_labels": [0, 1], "num_inference_steps": 2}
    latents = pipe(**make, generator=seeded(), output_type="latent").images
    images = pipe(**make, generator=seeded(), output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, (decode_latents(vae, latents) / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sdxl", {"latents_std": None}, "latents_mean and latents_std of as many"),
        ("sdxl", {"latents_mean": None}, "latents_mean and latents_std of as many"),
        ("sdxl", {"shift_factor": 0.2}, "Expected a shift_factor, or latents_mean"),
        ("sdxl", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std above 0"),
        ("sdxl", {"latents_mean": [1.0, float("nan"), 1.0, 1.0]}, "Expected finite numbers"),
        ("sdxl", {"latents_mean": MEAN[:3]}, "Expected 4 numbers as latents_mean of AutoencoderKL.*got 3"),
        ("sdxl", {"latents_mean": 0.5}, "Expected a list of numbers as latents_mean"),
        ("wan", {"latents_std": STD + STD[:1]}, "Expected 4 numbers as latents_std of AutoencoderKLWan.*got 5"),
        ("sd", {"scaling_factor": 0.0}, "scaling_factor and latents_std above 0"),
        ("flux", {"scaling_factor": -0.5}, "scaling_factor and latents_std above 0"),
        ("dc", {"scaling_factor": float("inf")}, "Expected finite numbers"),
    ],
)
def test_statistics_that_no_pipeline_would_use_are_refused(kind, changes, message):
    vae = make_vae(kind, **changes)
    with pytest.raises(ValueError, match=message):
        encode_images(vae, IMAGES)
    with pytest.raises(ValueError, match=message):
        decode_latents(vae, torch.zeros(1, 4, 8, 8))


def test_an_absent_scale_is_one_and_the_first_of_several_frames_counts():
    assert latent_codec(make_vae("sd", scaling_factor=None)) == LatentCodec()
    cosmos = SimpleNamespace(  # a tiny AutoencoderKLCosmos takes seconds; its statistics are C x frames numbers
        config={"latent_channels": 2, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [5.0, 6.0, 7.0, 8.0]},
        encoder=torch.nn.Conv3d(1, 1, 1),
    )
    assert latent_codec(cosmos) == LatentCodec(latents_mean=(1.0, 3.0), latents_std=(5.0, 7.0))


@pytest.mark.parametrize(
    ("kind", "resolution", "message"),
    [
        ("sd", 15, "multiple of the VAE's downsampling, got 15"),
        ("flux2", 18, "multiple of the VAE's downsampling, got 18, which becomes 4: .*Flux2 makes one pixel of 4x4"),
        ("rae", 32, r"images of 32x32 pixels.*which makes latents \[64, 8, 8\] and images \[3, 16, 16\]"),
    ],
)
def test_a_resolution_that_does_not_come_back_is_refused(kind, resolution, message):
    with pytest.raises(ValueError, match=message):
        check_vae(make_vae(kind), resolution)


def test_a_vae_that_cannot_decode_single_images_is_refused():
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2
    )
    with pytest.raises(ValueError, match="single images of 16x16 pixels, got AutoencoderKLTemporalDecoder"):
        check_vae(vae.eval(), 16)
