# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images of a repository whose terms must be accepted first, as ImageNet's."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from diffusers import AutoencoderKL

from diffusers_tread.data import LatentsInfo


datasets = pytest.importorskip("datasets")
RUN = f"""
    import sys

    sys.path.insert(0, {str(Path(__file__).parents[2] / "examples")!r})
    import precompute_latents

    precompute_latents.main(sys.argv[1:])
"""


def test_images_without_access_are_a_clear_message_and_the_same_command_goes_on(
    hub_server, hub_client, repo_id, tmp_path
):
    images = [PIL.Image.fromarray(np.full((16, 16, 3), 20 * index, np.uint8)) for index in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    records = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 2}, features=features)
    records.to_parquet(tmp_path / "train.parquet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    repo = hub_server.add_repo(repo_id, "dataset")
    file = hub_server.store("data/train.parquet", (tmp_path / "train.parquet").read_bytes())
    repo.commit("main", "Images", {file.path: file})

    argv = ["--dataset_name", repo_id, "--resolution", 16, "--pretrained_vae_name_or_path", tmp_path / "vae"]
    argv += ["--output_dir", tmp_path / "latents", "--cache_dir", tmp_path / "cache"]
    repo.gated = True
    result = hub_client.run(RUN, *argv, token="hf_bee", check=False)
    assert result.returncode != 0
    assert f"ValueError: Expected access to the data set {repo_id}, got: " in result.output
    assert f"accept its terms at https://huggingface.co/datasets/{repo_id} and log in" in result.output
    assert not (tmp_path / "latents").exists()

    repo.readers.add("bee")
    hub_client.run(RUN, *argv, token="hf_bee")
    info = LatentsInfo.load(tmp_path / "latents")
    assert info.num_samples == 4 and info.source["revision"] == repo.at("main").sha
