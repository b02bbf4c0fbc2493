# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""precompute_latents.py over images that change, and over VAEs of every kind."""

import dataclasses
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread.data import LatentsInfo, latent_codec, latents_from_moments, open_latents


datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import precompute_latents  # noqa: E402
from tiny_vaes import KINDS, make_vae  # noqa: E402


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def made(tmp_path):
    """Six images of two classes and a VAE."""
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            save(tmp_path / "images" / name / f"{index}.png", 3 * label + index)
    make_vae("sd").save_pretrained(tmp_path / "vae")
    return tmp_path


def save(path, seed, side=20):
    pixels = np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def precompute(made, *flags, data="folder", name="images"):
    precompute_latents.main(
        [
            *("--data", f"{data}:{made / name}", "--resolution", "16", "--cache_dir", str(made / "cache")),
            *("--pretrained_vae_name_or_path", str(made / "vae"), "--output_dir", str(made / "latents")),
            *("--shard_size", "2", "--batch_size", "2", *flags),
        ]
    )


def times(made):
    return {path.name[:11]: path.stat().st_mtime_ns for path in (made / "latents" / "data").iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        lambda path: save(path, 99),
        lambda path: save(path, 99, side=24),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: os.utime(path, ns=(0, 5)),
    ],
)
def test_a_finished_folder_of_changed_images_is_refused_with_the_shard(made, change):
    precompute(made)
    before = times(made)
    change(made / "images" / "bee" / "0.png")
    with pytest.raises(ValueError, match=r"got others under the same names.*\['data/train-00001-of-00003.arrow'\]"):
        precompute(made)
    assert times(made) == before


def test_a_repaired_image_is_encoded_by_the_same_command(made):
    """What the error about too many unreadable images asks for; other shards are kept."""
    damaged = [made / "images" / name / "1.png" for name in ("ant", "bee")]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="at most 1 unreadable images, got 2"):
        precompute(made, "--max_corrupt_images", "1")
    assert set(times(made)) == {"train-00000", "train-00001"}
    before = times(made)
    for path, content in zip(damaged, whole, strict=True):
        path.write_bytes(content)
    precompute(made, "--max_corrupt_images", "1")
    info = LatentsInfo.load(made / "latents")
    assert info.num_samples == 6 and info.unreadable == ()
    assert times(made)["train-00001"] == before["train-00001"] and times(made)["train-00000"] > before["train-00000"]


def test_images_that_only_moved_are_the_same(made):
    precompute(made)
    shutil.move(made / "images", made / "elsewhere" / "images")
    precompute(made, name="elsewhere/images")


def test_edited_images_inside_a_repository_are_noticed(made):
    """A local folder of Parquet files, whose rows hold the images."""

    def write(seed):
        rows = []
        for index in range(4):
            file = io.BytesIO()
            PIL.Image.new("RGB", (20, 20), (index, seed if index == 3 else 0, 0)).save(file, "bmp")
            rows.append({"bytes": file.getvalue(), "path": f"{index}.bmp"})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
        table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features=features)
        (made / "repository").mkdir(exist_ok=True)
        table.to_parquet(str(made / "repository" / "train.parquet"))

    write(0)
    precompute(made, data="hub", name="repository")
    precompute(made, data="hub", name="repository")
    write(7)
    with pytest.raises(ValueError, match=r"got others under the same names.*\['data/train-00001-of-00002.arrow'\]"):
        precompute(made, data="hub", name="repository")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_any_vae_trains_as_its_pipeline_normalises(made, kind):
    vae = make_vae(kind)
    shutil.rmtree(made / "vae")
    vae.save_pretrained(made / "vae")
    # The statistics are those of the weights on the disk, whatever the VAE computes in.
    precompute(made, "--dtype", "float32", *(["--vae_dtype", "bfloat16"] if kind in ("flux2", "ltx") else []))
    dataset = open_latents(made / "latents")
    assert dataset.info.codec == latent_codec(vae)
    assert dataclasses.asdict(dataset.info)["latents_std"] == latent_codec(vae).latents_std

    moments = dataset.__getitems__([(0, index) for index in range(6)])["moments"]
    latents = latents_from_moments(moments, dataset.info, generator=torch.Generator().manual_seed(0))
    assert latents.shape == (6, dataset.channels, *[dataset.info.latent_size] * 2)
    card = (made / "latents" / "README.md").read_text()
    namespace = {"torch": torch, "values": moments}
    torch.manual_seed(0)
    exec(card.split(".float()\n")[1].split("```")[0], namespace)
    torch.testing.assert_close(namespace["latents"], latents)
