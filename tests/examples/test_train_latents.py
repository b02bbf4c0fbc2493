# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""train_tread.py on a folder of latents, and the FID that it measures on the way."""

import json
import os
import random
import shutil
import sys
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
import train_tread
from diffusers import AutoencoderKL
from runs import assert_bitwise_equal, call, interrupting, launch, weights_of
from tiny_models import SIZE, save_extractor, save_noise, save_vae

from diffusers_tread import TREADPipeline
from diffusers_tread.data import EpochBatchSampler, LatentsDataset, LatentsInfo, LatentsWriter, encode_moments
from diffusers_tread.fingerprint import weights_fingerprint
from diffusers_tread.metrics import load_feature_extractor
from diffusers_tread.runs import fid_curve, outputs
from diffusers_tread.runs.checkpoints import list_checkpoints
from diffusers_tread.seeds import derive_seed


pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
train = partial(call, train_tread)
CLASSES = {0: "ant", 1: "bee", 2: "cat"}
TINY = {
    "model_config_name_or_path": {**SIZE, "patch_size": 2},
    "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 10, "checkpointing_steps": 4,
    "learning_rate": 0.01, "use_ema": True, "ema_decay": 0.9, "random_flip": True, "class_dropout_prob": 0.3,
    "eval_num_samples": 7, "eval_batch_size": 3, "eval_inference_steps": 2,
}  # fmt: skip


def make_latents(folder, *, vae, vae_folder, seed=0):
    """The latents of 13 random 16x16 images of three classes in three shards, mirrored ones too."""
    images = torch.rand(13, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    records = {
        "moments": encode_moments(vae, images),
        "moments_flipped": encode_moments(vae, images.flip(-1)),
        "label": torch.arange(13) % 3,
    }
    info = LatentsInfo(
        kind="moments", dtype="float16", latent_channels=4, latent_size=8, resolution=16, scaling_factor=0.7,
        shift_factor=0.1, vae={"name_or_path": str(vae_folder), "fingerprint": weights_fingerprint(vae)}, source={},
        has_flipped=True, id2label=CLASSES, num_samples=1, shards=(),
    )  # fmt: skip
    writer = LatentsWriter(folder, info, num_shards=3)
    writer.open({})
    for shard, rows in enumerate((slice(0, 5), slice(5, 10), slice(10, 13))):
        names = [f"image {row}" for row in range(13)[rows]]
        batch = {name: values[rows] for name, values in records.items()}
        writer.write(shard, [{"names": names, "unreadable": [], **batch}])
    writer.finish()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with `vae`, `latents`, `reference` (images) and `network` (a feature extractor's)."""
    folder = tmp_path_factory.mktemp("data")
    vae = save_vae(folder / "vae", scaling_factor=0.7, shift_factor=0.1)
    make_latents(folder / "latents", vae=vae, vae_folder=folder / "vae")
    save_noise(folder / "reference", 9, 16, 16)
    save_extractor(folder / "network")
    return folder


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path / "config.json"


@pytest.fixture
def argv(data, config):
    return ["--config", config, "--data", f"latents:{data / 'latents'}"]


@pytest.fixture
def evaluation(data):
    return [
        *("--eval_steps", 5, "--eval_reference", data / "reference"),
        *("--eval_feature_extractor", f"transformers:{data / 'network'}"),
    ]


def fids(run):
    return [(record["step"], record["fid"]) for record in json.loads((run / "metrics.json").read_text())]


def test_each_batch_is_a_new_sample_of_the_stored_posterior_shifted_and_scaled(argv, data, tmp_path, monkeypatch):
    seen, next_batch = [], train_tread.Trainer.next_batch

    def watch(trainer, micro_step):
        latents, conditions, routing = next_batch(trainer, micro_step)
        seen.append((trainer.step, micro_step, latents, conditions["class_labels"].cpu()))
        return latents, conditions, routing

    monkeypatch.setattr(train_tread.Trainer, "next_batch", watch)
    train(*argv, "--output_dir", tmp_path / "run", "--seed", 3, "--class_dropout_prob", 0)

    dataset = LatentsDataset(data / "latents", seed=3, random_flip=True)
    order = iter(EpochBatchSampler(13, batch_size=3, seed=3))
    for step, micro_step, latents, labels in seen:
        batch = dataset.__getitems__(next(order))
        mean, std = batch["moments"].float().chunk(2, dim=1)
        generator = torch.Generator(latents.device).manual_seed(derive_seed(3, step, micro_step, 0, "noise"))
        noise = torch.randn(mean.shape, generator=generator, device=latents.device)
        expected = 0.7 * (mean.to(noise) + std.to(noise) * noise - 0.1)
        torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(labels, batch["class_labels"])
    assert len(seen) == 20


def test_the_pipeline_gets_the_vae_that_made_the_latents(argv, data, tmp_path):
    train(*argv, "--output_dir", tmp_path / "run", "--max_train_steps", 1)
    pipeline = TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert weights_fingerprint(pipeline.vae) == LatentsInfo.load(data / "latents").vae["fingerprint"]
    assert pipeline.config.id2label == {str(label): name for label, name in CLASSES.items()}
    assert (pipeline.transformer.config.sample_size, pipeline.transformer.config.in_channels) == (8, 4)
    assert pipeline("bee", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.long
def test_killed_runs_end_bitwise_like_others_that_also_sampled_and_measured(argv, evaluation, tmp_path):
    """In two processes with DDP and in two with FSDP2, each killed in the middle of a random step."""
    step, plan = random.Random(os.urandom(8)).randrange(1, 10), []
    print(f"killed in step {step}")
    kinds = {"ddp": {"processes": 2}, "fsdp": {"processes": 2, "fsdp": True}}
    sampling = [*evaluation, "--validation_steps", 4, "--num_validation_images", 3, "--validation_inference_steps", 1]
    kill = {"at": ["train_tread.Trainer.next_batch"], "count": 2 * step + 2}  # the second batch of the step
    for name, kind in kinds.items():
        plan.append({"argv": [*argv, *sampling, "--output_dir", tmp_path / f"whole-{name}"], **kind})
        killed = {"argv": [*argv, "--output_dir", tmp_path / f"killed-{name}"], **kind}
        plan += [killed | {"kill": kill}, killed]
    codes, _ = launch(plan)
    assert codes == [0, -9, 0] * 2

    for name in kinds:
        run = tmp_path / f"whole-{name}"
        assert_bitwise_equal(run, tmp_path / f"killed-{name}")
        assert [at for at, _ in fids(run)] == [5, 10] and not list((run / "eval").glob("step-*"))
        assert len(list((run / "samples").glob("step-*.png"))) == 3

    # What was gathered from shards is the average, and what DDP finds up to rounding.
    ema, pipeline = weights_of(tmp_path / "whole-fsdp")
    assert all(torch.equal(ema[name], pipeline[name]) for name in ema)
    torch.testing.assert_close(pipeline, weights_of(tmp_path / "whole-ddp")[2], atol=1e-3, rtol=0)
    distances = [[fid for _, fid in fids(tmp_path / f"whole-{name}")] for name in ("ddp", "fsdp")]
    assert distances[0] == pytest.approx(distances[1], rel=0.05)


def test_a_streamed_run_goes_on_exactly(argv, tmp_path):
    argv = [*argv, "--streaming", "--shuffle_buffer", 4, "--output_dir"]
    train(*argv, tmp_path / "whole")
    with interrupting(train_tread.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 6):
        train(*argv, tmp_path / "stopped")
    train(*argv, tmp_path / "stopped")
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_goes_on_with_latents_that_were_moved_but_not_with_others(argv, data, tmp_path):
    argv = [*argv, "--output_dir", tmp_path / "run", "--max_train_steps", 1]
    train(*argv)
    shutil.copytree(data / "latents", tmp_path / "moved")
    train(*argv, "--data", f"latents:{tmp_path / 'moved'}")

    vae = AutoencoderKL.from_pretrained(data / "vae")
    make_latents(tmp_path / "others", vae=vae, vae_folder=data / "vae", seed=1)
    with pytest.raises(ValueError, match="latents: '.* there, '.* now"):
        train(*argv, "--data", f"latents:{tmp_path / 'others'}")


def test_the_fid_is_that_of_the_averaged_weights(argv, evaluation, data, tmp_path):
    """The last one against the saved pipeline, sampled and measured anew with numpy."""
    train(*argv, *evaluation, "--output_dir", tmp_path / "run", "--max_train_steps", 6)
    assert [step for step, _ in fids(tmp_path / "run")] == [5, 6]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["fid.png"]

    pipeline = TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    seeds = [derive_seed(0, "evaluate", index) for index in range(7)]
    images = pipeline(
        class_labels=[index % 3 for index in range(7)],
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    references = [PIL.Image.open(path) for path in (data / "reference").iterdir()]
    extractor = load_feature_extractor(f"transformers:{data / 'network'}")
    means, covariances = [], []
    for pictures in (images, references):
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        features = extractor(pixels)["features"].double().numpy()
        means.append(features.mean(axis=0))
        covariances.append(np.cov(features, rowvar=False))
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots
    assert fids(tmp_path / "run")[-1][1] == pytest.approx(expected, rel=1e-3)


def test_a_run_killed_while_it_sampled_or_measured_does_it_again(argv, evaluation, tmp_path):
    train(*argv, "--checkpointing_steps", 5, "--output_dir", tmp_path / "without")
    argv = [*argv, *evaluation, "--checkpointing_steps", 5, "--validation_steps", 5, "--num_validation_images", 3]
    argv += ["--validation_inference_steps", 1, "--output_dir"]
    train(*argv, tmp_path / "whole")
    for place, name in ((outputs, "sample_grid"), (fid_curve, "evaluate_images"), (fid_curve, "save_curve")):
        with interrupting(place, name):
            train(*argv, tmp_path / "killed")
    train(*argv, tmp_path / "killed")
    assert fids(tmp_path / "whole") == fids(tmp_path / "killed")
    for other in ("without", "killed"):
        assert_bitwise_equal(tmp_path / "whole", tmp_path / other)
    assert not list((tmp_path / "killed" / "eval").glob("step-*"))
    names = ["fid.png", "step-0000005.png", "step-0000010.png"]
    assert sorted(path.name for path in (tmp_path / "killed" / "samples").iterdir()) == names


def test_a_finished_run_is_measured_when_asked_later_and_forgotten_when_overwritten(argv, evaluation, tmp_path):
    argv = [*argv, "--output_dir", tmp_path / "run", "--max_train_steps", 2]
    train(*argv)
    assert not (tmp_path / "run" / "metrics.json").exists()
    train(*argv, *evaluation)
    assert [step for step, _ in fids(tmp_path / "run")] == [2]
    train(*argv, "--overwrite_output_dir")
    names = {"checkpoint-2", "pipeline", "run.json", "train_config.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "32"], "resolution 16"),
        (["--num_classes", "4"], "num_classes 3, those of"),
        (["--pretrained_vae_name_or_path", "{data}/nowhere"], "Expected a VAE at .*nowhere"),
        (["--pretrained_vae_name_or_path", "{other}"], "Expected the VAE that made the latents"),
        (["--model_config_name_or_path", '{"in_channels": 3}'], "in_channels=4"),
        (["--model_config_name_or_path", '{"sample_size": 16}'], "sample_size=8"),
        (["--data", "latents:{data}/reference"], "latents.json"),
        (["--eval_steps", "5"], "--eval_reference"),
        (["--eval_steps", "5", "--eval_reference", "{data}/nowhere.npz"], "nowhere.npz"),
        (["--eval_steps", "5", "--eval_reference", "{data}/reference", "--eval_feature_extractor", "vgg"], "vgg"),
        (["--eval_num_samples", "0"], "eval_num_samples > 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(argv, data, tmp_path, options, message):
    save_vae(tmp_path / "other", seed=1)
    options = [option.replace("{data}", str(data)).replace("{other}", str(tmp_path / "other")) for option in options]
    with pytest.raises(ValueError, match=message):
        train(*argv, "--output_dir", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_measuring_without_matplotlib_is_refused_before_anything_is_written(argv, evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="Expected matplotlib"):
        train(*argv, *evaluation, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named_before_anything_is_written(argv, data, tmp_path):
    shutil.copytree(data / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "data" / "train-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match="train-00001-of-00003.arrow"):
        train(*argv, "--data", f"latents:{tmp_path / 'latents'}", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_size_is_refused_before_the_first_step(argv, evaluation, data, tmp_path):
    save_noise(tmp_path / "reference", 2, 8, 8)
    with pytest.raises(ValueError, match="size"):
        train(*argv, *evaluation, "--eval_reference", tmp_path / "reference", "--output_dir", tmp_path / "run")
    assert not list_checkpoints(tmp_path / "run")
