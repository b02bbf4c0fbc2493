# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""train_tread.py with --loss_terms alignment: what is trained beside the model, kept in checkpoints and left out."""

import json
from functools import partial

import precompute_latents
import pytest
import torch
import train_tread
from runs import assert_bitwise_equal, call, files_of, interrupting, launch, weights_of
from tiny_models import SIZE, save_extractor, save_noise, save_vae

from diffusers_tread import TREADPipeline
from diffusers_tread.data import LatentsInfo, TrainingSource, open_source
from diffusers_tread.objectives.terms.vision_encoder import VisionEncoder


pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
train = partial(call, train_tread)
ROUTES = [{"start": 1, "end": 2, "selection_ratio": 0.5}]
TINY = {
    "model_config_name_or_path": {**SIZE, "patch_size": 2, "routes": ROUTES}, "resolution": 8,
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 6, "checkpointing_steps": 3,
    "learning_rate": 0.01, "use_ema": True, "ema_decay": 0.9, "dense_fraction": 0.2,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Arguments of a run of a name with changed settings, on two classes of three images."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for label, name in enumerate(("ant", "bee")):
        save_noise(tmp_path / "images" / name, 3, 8, 8, seed=label)
    save_extractor(tmp_path / "dinov2")
    alignment = {"encoder": str(tmp_path / "dinov2"), "blocks": [1, 4], "projector_dim": 8, "until_step": 5}

    def arguments(name, *, is_aligned=True, **changes):
        terms = json.dumps({"alignment": alignment} if is_aligned else {})
        config = TINY | {"data": f"folder:{tmp_path / 'images'}", "loss_terms": terms} | changes
        return ["--config", json.dumps(config), "--output_dir", tmp_path / name]

    return arguments


def test_a_run_that_was_stopped_ends_with_the_same_bits_and_the_pipeline_has_no_projector(run, tmp_path):
    train(*run("whole"))
    with interrupting(train_tread.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 4):
        train(*run("stopped"))
    train(*run("stopped"))
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")

    # A checkpoint has the projectors and their averages, what is saved has the model of a plain run.
    train(*run("plain", is_aligned=False, max_train_steps=1))
    model, ema, pipeline = weights_of(tmp_path / "whole")
    plain = weights_of(tmp_path / "plain")[2]
    assert {name: weight.shape for name, weight in pipeline.items()} == {n: w.shape for n, w in plain.items()}
    assert not all(torch.equal(pipeline[name], plain[name]) for name in plain)
    places = [f"heads.{block}.{layer}" for block in (1, 4) for layer in (0, 2, 4)]
    projectors = {f"{place}.{part}" for place in places for part in ("weight", "bias")}
    assert set(model) == set(ema) == {f"denoiser.{name}" for name in pipeline} | projectors
    assert all(torch.equal(ema[f"denoiser.{name}"], pipeline[name]) for name in pipeline)
    configs = [tmp_path / name / "pipeline" / "transformer" / "config.json" for name in ("whole", "plain")]
    assert configs[0].read_bytes() == configs[1].read_bytes()
    images = TREADPipeline.from_pretrained(tmp_path / "whole" / "pipeline")(["bee"], num_inference_steps=1).images
    assert images[0].size == (8, 8)

    # The projectors are part of the run.
    with pytest.raises(ValueError, match="Expected the heads settings"):
        train(*run("whole", is_aligned=False, max_train_steps=8), "--resume_from_checkpoint", "latest")


def test_the_encoder_sees_the_images_that_the_latents_are_made_of(run, tmp_path, monkeypatch):
    encoded, seen, to_latents, look = [], [], TrainingSource.to_latents, VisionEncoder.__call__

    def watch_source(source, batch, **options):
        encoded.append(batch["pixel_values"])
        return to_latents(source, batch, **options)

    def watch_encoder(encoder, images, grid_size):
        seen.append((images, grid_size))
        return look(encoder, images, grid_size)

    monkeypatch.setattr(TrainingSource, "to_latents", watch_source)
    monkeypatch.setattr(VisionEncoder, "__call__", watch_encoder)
    save_vae(tmp_path / "vae")
    train(*run("run", max_train_steps=1, random_flip=True), "--pretrained_vae_name_or_path", tmp_path / "vae")
    for pixels, (images, grid_size) in zip(encoded, seen, strict=True):
        assert torch.equal(pixels.to(images.device), images) and images.shape == (2, 3, 8, 8) and grid_size == (2, 2)


# Features that are stored with latents.


@pytest.fixture
def precompute(tmp_path, run):
    """Makes latents of a name of these images, with both flips and DINOv2's features."""
    save_vae(tmp_path / "vae")

    def make(name, *more):
        argv = ["--data", f"folder:{tmp_path / 'images'}", "--pretrained_vae_name_or_path", tmp_path / "vae"]
        argv += ["--output_dir", tmp_path / name, "--resolution", 8, "--dtype", "float32", "--flip"]
        argv += ["--shard_size", 4, "--batch_size", 2, "--pretrained_vision_encoder", tmp_path / "dinov2"]
        call(precompute_latents, *argv, *more)
        return LatentsInfo.load(tmp_path / name)

    return make


def test_stored_features_train_as_the_images_do_up_to_their_rounding(run, precompute, tmp_path, monkeypatch, capsys):
    info = precompute("latents")
    assert info.patch_features.shape((4, 4)) == (4, 16) and info.patch_features.dtype == "float16"
    size = "0.25 KiB"  # 4 tokens of 16 numbers, twice
    assert f"{size} per image" in capsys.readouterr().out
    assert "0.125 KiB each" in (tmp_path / "latents" / "README.md").read_text()

    losses, step = [], train_tread.Trainer.train_step
    monkeypatch.setattr(train_tread.Trainer, "train_step", lambda one: losses.append(loss := step(one)) or loss)
    alignment = {"encoder": str(tmp_path / "dinov2"), "blocks": [0, 4], "projector": "conv", "spatial_norm": 0.6}
    options = {"max_train_steps": 2, "random_flip": True, "dense_fraction": 0.5, "gradient_accumulation_steps": 1}
    options["loss_terms"] = json.dumps({"alignment": alignment})
    train(*run("images", **options), "--pretrained_vae_name_or_path", tmp_path / "vae")
    monkeypatch.setattr(VisionEncoder, "__call__", None)  # nothing looks any more
    train(*run("stored", **options, data=f"latents:{tmp_path / 'latents'}"))
    images, stored = torch.stack(losses).split(2)
    torch.testing.assert_close(images, stored, atol=1e-3, rtol=0)
    assert not torch.equal(images, stored)  # in what float16 leaves of the features

    # The convolutions are averaged, and not saved with the model.
    model, ema, pipeline = weights_of(tmp_path / "stored")
    assert model["heads.4.conv.weight"].shape == ema["heads.0.conv.weight"].shape == (16, 16, 3, 3)
    assert set(model) - {f"denoiser.{name}" for name in pipeline} == {
        f"heads.{block}.conv.{part}" for block in (0, 4) for part in ("weight", "bias")
    }


def test_each_flip_has_its_own_features_and_killed_runs_end_with_the_same_bytes(precompute, run, tmp_path):
    info = precompute("whole", "--features_dtype", "bfloat16")
    with interrupting(precompute_latents.LatentsWriter, "write", lambda writer, shard, batches: shard == 1):
        precompute("killed", "--features_dtype", "bfloat16")
    precompute("killed", "--features_dtype", "bfloat16")
    whole, killed = (
        {path: content for path, content in files_of(tmp_path / name).items() if path != "README.md"}
        for name in ("whole", "killed")
    )
    assert whole == killed

    # Against the encoder on the images as training has them.
    encoder = VisionEncoder.from_pretrained(str(tmp_path / "dinov2"))
    pixels = open_source(f"folder:{tmp_path / 'images'}", resolution=8)
    images = torch.cat([pixels.dataset[0, index]["pixel_values"][None] for index in range(6)])
    expected = torch.cat([encoder(images, (2, 2)), encoder(images.flip(-1), (2, 2))]).bfloat16()
    source, seen = open_source(f"latents:{tmp_path / 'whole'}", random_flip=True), set()
    batches = source.batches(batch_size=2, seed=0, features=True)
    for batch in (next(batches) for _ in range(20)):
        for features in source.image_features(batch, device=torch.device("cpu")):
            distance, place = (features.float() - expected.float()).abs().amax(dim=(1, 2)).min(dim=0)
            assert distance < 0.05
            seen.add(place.item())
    assert seen == set(range(12)) and info.patch_features.encoder == encoder.identity()


def test_stored_features_that_do_not_fit_are_refused_before_anything_is_written(run, precompute, tmp_path):
    precompute("latents")
    data = {"data": f"latents:{tmp_path / 'latents'}"}
    with pytest.raises(ValueError, match="dinov2, patch size 2.*patch_size: 2 there, 4 now"):
        train(*run("run", **data, model_config_name_or_path={**SIZE, "patch_size": 4, "routes": ROUTES}))
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    with pytest.raises(ValueError, match="the encoder and the patches of the features that are stored.*encoder.mean"):
        train(*run("run", **data))
    with pytest.raises(ValueError, match="Expected a vision encoder"):
        precompute("other", "--pretrained_vision_encoder", "nowhere")
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()


@pytest.mark.long
def test_killed_runs_of_two_processes_end_bitwise_like_others(run, tmp_path):
    """With DDP and with FSDP2, killed in the fifth step, after a checkpoint."""
    kinds = {"ddp": {"processes": 2}, "fsdp": {"processes": 2, "fsdp": True}}
    kill, plan = {"at": ["train_tread.Trainer.next_batch"], "count": 10}, []
    for name, kind in kinds.items():
        killed = {"argv": run(f"killed-{name}"), **kind}
        plan += [{"argv": run(f"whole-{name}"), **kind}, killed | {"kill": kill}, killed]
    codes, _ = launch(plan)
    assert codes == [0, -9, 0] * 2
    for name in kinds:
        assert_bitwise_equal(tmp_path / f"whole-{name}", tmp_path / f"killed-{name}")

    # What was gathered from shards is what DDP finds, up to rounding; the projectors are trained in both.
    averages = [weights_of(tmp_path / f"whole-{name}")[-2] for name in kinds]
    torch.testing.assert_close(*averages, atol=1e-3, rtol=0)
    assert len([name for name in averages[1] if name.startswith("heads.")]) == 12
    assert all(averages[1][f"heads.{block}.4.bias"].any() for block in (1, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": "latents:nowhere", "num_classes": 2, "resolution": 16, "dry_run": True},
            "Expected data with images for the loss",
        ),
        ({"loss_terms": '{"alignment": {"encoder": "nowhere", "blocks": [1]}}'}, "Expected a vision encoder"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(*run("run", **changes))
    assert not (tmp_path / "run").exists()
