# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""train_tread.py with VAEs of every kind: what it trains on is what it decodes."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_tread import TREADPipeline
from diffusers_tread.data import (
    LatentCodec,
    LatentsInfo,
    LatentsWriter,
    check_vae,
    decode_latents,
    encode_moments,
    latent_codec,
    open_source,
)
from diffusers_tread.fingerprint import weights_fingerprint


pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_tread  # noqa: E402
from tiny_vaes import make_vae  # noqa: E402


def make_latents(folder, vae, **codec):
    kind, channels, size = check_vae(vae, 16)
    info = LatentsInfo(
        kind=kind, dtype="float32", latent_channels=channels, latent_size=size, resolution=16, source={},
        vae={"name_or_path": str(folder / "vae"), "fingerprint": weights_fingerprint(vae)}, id2label={0: "a", 1: "b"},
        num_samples=1, shards=(), **dataclasses.asdict(latent_codec(vae)) | codec,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    writer = LatentsWriter(folder / "latents", info, num_shards=1)
    writer.open({})
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"names": list("abcd"), "unreadable": [], "label": [0, 1, 0, 1], "moments": encode_moments(vae, images)}
    writer.write(0, [batch])
    writer.finish()
    return folder / "latents"


def open_with(folder, name=None):
    return open_source(f"latents:{folder}", pretrained_vae_name_or_path=name)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sdxl", {"latents_mean": [0.0] * 4}),
        ("sdxl", {"latents_mean": None, "latents_std": None}),
        ("sd", {"scaling_factor": 0.6}),
        ("flux", {"shift_factor": None}),
        ("flux2", {"batch_norm_eps": 0.1}),
    ],
)
def test_a_vae_of_the_same_weights_that_normalises_otherwise_is_refused(tmp_path, kind, changes):
    vae = make_vae(kind)
    latents = make_latents(tmp_path, vae)
    source, info = open_with(latents), LatentsInfo.load(latents)
    assert (source.channels, source.latent_size) == (info.latent_channels, info.latent_size)
    make_vae(kind, **changes).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="Expected a VAE that normalises as the latents of .*LatentCodec"):
        open_with(latents, str(tmp_path / "other"))


def test_latents_that_were_normalised_elsewhere_go_with_the_vae(tmp_path):
    latents = make_latents(tmp_path, make_vae("sdxl"), **dataclasses.asdict(LatentCodec()))
    assert latent_codec(open_with(latents).vae) == latent_codec(make_vae("sdxl"))


def test_the_statistics_are_part_of_what_a_run_is_known_by(tmp_path):
    source = open_with(make_latents(tmp_path, make_vae("sdxl")))
    before = source.identity()
    source.info = dataclasses.replace(source.info, latents_mean=(0.0,) * 4)
    assert source.identity() != before


@pytest.mark.parametrize("kind", ["flux2", "wan"])
def test_a_run_trains_on_packed_and_video_latents_and_decodes_them(tmp_path, kind):
    AcceleratorState._reset_state(True)
    vae = make_vae(kind)
    latents = make_latents(tmp_path, vae)
    model = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}
    config = {"model_config_name_or_path": model, "routes": "none", "train_batch_size": 2, "max_train_steps": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"checkpointing_steps": 2, "use_ema": False}))
    argv = ["--config", tmp_path / "config.json", "--data", f"latents:{latents}", "--output_dir", tmp_path / "run"]
    train_tread.main([str(word) for word in argv])
    pipe = TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    make = {"class_labels": [0], "num_inference_steps": 2}
    made = pipe(**make, generator=torch.Generator().manual_seed(0), output_type="latent").images
    images = pipe(**make, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(images, (decode_latents(vae, made) / 2 + 0.5).clamp(0, 1))
    AcceleratorState._reset_state(True)
