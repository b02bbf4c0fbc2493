# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From images to an FID by the examples alone: precompute_latents.py, train_tread.py, evaluate_tread.py."""

import json

import pytest
from runs import launch
from tiny_models import SIZE, save_extractor, save_noise, save_vae

from diffusers_tread.metrics import load_results


pytest.importorskip("datasets")


@pytest.fixture
def data(tmp_path):
    """`images` of ten classes and different sizes, `reference` (16x16), a random `vae` and a random `network`."""
    for label in range(10):
        save_noise(tmp_path / "images" / f"class-{label}", 3, 18 + label % 3, 24, seed=label)
    save_noise(tmp_path / "reference", 20, 16, 16, seed=10)
    save_vae(tmp_path / "vae")
    save_extractor(tmp_path / "network")
    return tmp_path


@pytest.mark.long
def test_images_become_latents_a_model_and_an_fid_with_one_process_and_with_two(data, tmp_path):
    """Two processes write the bytes of one; the FID that one measures while training, two find again, and back."""
    encode = ["--data", f"folder:{data / 'images'}", "--resolution", 16, "--flip", "--shard_size", 8]
    encode += ["--batch_size", 4, "--pretrained_vae_name_or_path", data / "vae", "--cache_dir", data / "cache"]
    network = f"transformers:{data / 'network'}"
    model = json.dumps(SIZE | {"patch_size": 2})
    learn = ["--model_config_name_or_path", model, "--random_flip", "--train_batch_size", 5, "--use_ema"]
    learn += ["--max_train_steps", 6, "--eval_steps", 6, "--eval_reference", data / "reference"]
    learn += ["--eval_feature_extractor", network, "--eval_num_samples", 30, "--eval_batch_size", 8]
    learn += ["--eval_inference_steps", 2]
    judge = ["--reference", data / "reference", "--feature_extractor", network, "--num_samples", 30]
    judge += ["--batch_size", 8, "--num_inference_steps", 2, "--num_kept_images", 10]

    plan = []
    for processes, others in ((1, 2), (2, 1)):
        latents, run, judged = (tmp_path / f"{name}-{processes}" for name in ("latents", "run", "judged"))
        plan += [
            {"script": "precompute_latents", "processes": processes, "argv": [*encode, "--output_dir", latents]},
            {"processes": processes, "argv": [*learn, "--data", f"latents:{latents}", "--output_dir", run]},
        ]
        argv = [*judge, "--pretrained_pipeline", run / "pipeline", "--output_dir", judged]
        plan.append({"script": "evaluate_tread", "processes": others, "argv": argv})
    launch(plan)

    shards = [sorted((tmp_path / f"latents-{processes}" / "data").iterdir()) for processes in (1, 2)]
    assert [path.name for path in shards[0]] == [f"train-{shard:05d}-of-00004.arrow" for shard in range(4)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    for processes in (1, 2):
        (record,) = json.loads((tmp_path / f"run-{processes}" / "metrics.json").read_text())
        (path,) = (tmp_path / f"judged-{processes}" / "results").glob("*.json")
        metrics = load_results(path).metrics
        assert {"fid", "precision", "recall"} <= set(metrics)
        # Weights of the VAE that lie elsewhere in memory round differently, and then a pixel.
        assert metrics["fid"] == pytest.approx(record["fid"], rel=1e-3)
