# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Training that predicts clean images, from flags to samples."""

import json

import train_tread
from runs import call
from tiny_models import SIZE

from diffusers_tread import TREADPipeline


def test_a_network_of_clean_images_trains_and_samples_by_flags(tmp_path, fresh_accelerate):
    model = SIZE | {"patch_size": 2, "patch_bottleneck_dim": 3, "routes": [{"start": 1, "end": 2}]}
    argv = ["--objective", "jit", "--objective_config", '{"logit_mean": 0.5}', "--log_loss_by_time", "--use_ema"]
    argv += ["--model_config_name_or_path", json.dumps(model), "--loss_terms", '{"reconstruction": {}}']
    argv += ["--max_train_steps", 2, "--train_batch_size", 4, "--output_dir", tmp_path]
    call(train_tread, *argv, "--data", "digits:")

    pipe = TREADPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.objective == "jit" and pipe.transformer.config.patch_bottleneck_dim == 3
    assert pipe([3], num_inference_steps=2, output_type="pt").images.isfinite().all()
    settings = json.loads((tmp_path / "train_config.json").read_text())
    assert settings["objective"] == "jit" and settings["objective_config"] == '{"logit_mean": 0.5}'
