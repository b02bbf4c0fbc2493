# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Parts of the encoding that a folder of images does not reach; tests/examples runs the rest."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_tread.data import LatentsInfo, LatentsWriter, encode_moments, image_to_tensor
from diffusers_tread.data.latents.encoding import encode_shards


datasets = pytest.importorskip("datasets")


def test_images_without_a_file_have_numbers_and_a_null_is_unreadable(tmp_path):
    pixels = [np.random.RandomState(seed).randint(0, 256, (8, 8, 3), dtype=np.uint8) for seed in range(5)]
    images = [PIL.Image.fromarray(array) for array in pixels]
    images[3] = None
    source = datasets.Dataset.from_dict(
        {"photo": images, "kind": [2, 1, 0, 0, 1]},
        features=datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int64")}),
    ).cast_column("photo", datasets.Image(decode=False))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    info = LatentsInfo(
        kind="moments", dtype="float32", latent_channels=4, latent_size=8, resolution=8, scaling_factor=1.0, vae={},
        source={}, id2label={0: "a", 1: "b", 2: "c"}, num_samples=5, shards=(),
    )  # fmt: skip
    writer = LatentsWriter(tmp_path, info, num_shards=2, max_unreadable=1)
    columns = {"image_column": "photo", "label_column": "kind"}
    encode_shards(writer, writer.open({}), source, vae, **columns, plan=[range(3), range(3, 5)], batch_size=1)
    info = writer.finish()
    assert info.unreadable == ("image 3",) and [shard["num_samples"] for shard in info.shards] == [3, 1]

    table = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")).with_format(
        "arrow"
    )[:]
    assert table["label"].to_pylist() == [2, 1, 0, 1]
    values = torch.tensor(table["moments"].combine_chunks().flatten().to_numpy()).view(-1, 8, 8, 8)
    expected = [encode_moments(vae, image_to_tensor(images[index])[None]) for index in (0, 1, 2, 4)]
    assert torch.equal(values, torch.cat(expected))
