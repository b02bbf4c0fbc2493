# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""From images to an FID by the examples alone: precompute_latents.py, train_tread.py, evaluate.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from diffusers import AutoencoderKL

from diffusers_tread.metrics import load_results


transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    """`images` of ten classes and different sizes, `reference` (16x16), a random `vae` and a random `network`."""
    rng = np.random.RandomState(0)
    for label in range(10):
        (tmp_path / "images" / f"class-{label}").mkdir(parents=True)
        for index in range(3):
            pixels = (rng.rand(18 + index, 24, 3) * (25 * label + 30)).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "images" / f"class-{label}" / f"{index}.png")
    (tmp_path / "reference").mkdir()
    for index in range(20):
        pixels = rng.randint(0, 256, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "reference" / f"{index}.png")

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "network")
    normalisation = {"size": 28, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "network" / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return tmp_path


@pytest.mark.slow
def test_images_become_latents_a_model_and_an_fid_with_one_process_and_with_two(data, tmp_path):
    """Two processes write the bytes of one; the FID that one measures while training, two find again, and back."""
    encode = ["--train_data_dir", data / "images", "--resolution", 16, "--flip", "--shard_size", 8, "--batch_size", 4]
    encode += ["--pretrained_vae_name_or_path", data / "vae", "--cache_dir", data / "cache"]
    network = f"transformers:{data / 'network'}"
    model = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}
    learn = ["--model_config_name_or_path", json.dumps(model), "--random_flip", "--train_batch_size", 5, "--use_ema"]
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
            {"processes": processes, "argv": [*learn, "--latents_dir", latents, "--output_dir", run]},
            {
                "script": "evaluate",
                "processes": others,
                "argv": [*judge, "--pretrained_pipeline", run / "pipeline", "--output_dir", judged],
            },
        ]
    plan = [entry | {"argv": [str(word) for word in entry["argv"]]} for entry in plan]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(Path(__file__).with_name("forked_launch.py")), json.dumps(plan)]
    subprocess.run(command, env=environment, check=True, timeout=800)

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
