# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Folders of latents with what a vision encoder made of the images."""

import json
import shutil
from itertools import islice

import pyarrow as pa
import pytest
import torch

from diffusers_tread.data import LatentsInfo, LatentsWriter, make_batches, open_latents, verify_latents
from diffusers_tread.data.latents.features import StoredFeatures
from diffusers_tread.files import file_sha256


pytest.importorskip("datasets")
ENCODER = {"class_name": "AntModel", "fingerprint": "0" * 64, "mean": [0.5], "std": [0.2]}
STORED = {"encoder": ENCODER, "name_or_path": "ant", "revision": None, "encoder_dtype": "float32", "width": 3}
SIZES = ((2, 4), (4, 4))


def write(folder, batches, *, stored=None, **changes):
    """A shard for each batch, of latents of 4x4 or those of `latent_sizes`."""
    features = StoredFeatures(**{"dtype": "float16", "patch_size": 2} | STORED | (stored or {}))
    info = LatentsInfo(**{
        "kind": "latents", "dtype": "float16", "latent_channels": 2, "latent_size": 4, "resolution": 32,
        "scaling_factor": 0.5, "vae": {"name_or_path": "vae", "class_name": "V", "dtype": "float32", "revision": None},
        "source": {}, "id2label": {0: "ant", 1: "bee"}, "num_samples": 1, "shards": (), "has_flipped": True,
        "patch_features": features, "format_version": 2,
    } | changes)  # fmt: skip
    places = list(range(len(batches))) if info.latent_sizes else None
    writer = LatentsWriter(folder, info, num_shards=len(batches), size_places=places)
    for shard in writer.open({}):
        writer.write(shard, [batches[shard]])
    return writer.finish()


def make_batch(height=4, width=4, count=3):
    """Whose features, like latents, are told by their first value, those of mirrored images by its sign."""
    moments = torch.randn(count, 2, height, width).half().abs()
    features = torch.randn(count, height * width // 4, 3).half()
    features[:, 0, 0] = moments[:, 0, 0, 0]
    batch = {"names": [f"image {index}" for index in range(count)], "unreadable": [], "label": [0] * count}
    batch |= {"moments": moments, "moments_flipped": -moments}
    return batch | {"features": features, "features_flipped": -features}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    folder, batches = tmp_path_factory.mktemp("whole") / "latents", [make_batch(), make_batch()]
    write(folder, batches)
    return folder, batches


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "latents")


def take(dataset, count=12):
    return list(islice(make_batches(dataset, batch_size=2, seed=0), count))


@pytest.mark.parametrize("streaming", [False, True])
def test_features_come_back_bit_for_bit_with_the_latents_of_the_same_image(whole, streaming):
    folder, batches = whole
    dataset = open_latents(folder, streaming=streaming, random_flip=True)
    assert all("features" not in batch for batch in take(dataset, 2))  # which a training without alignment reads
    written = torch.cat([batch["features"] for batch in batches])
    seen = set()
    for batch in take(dataset.with_features()):
        assert batch["features"].dtype == torch.float16 and batch["features"].shape == (2, 4, 3)
        for moments, features in zip(batch["moments"], batch["features"], strict=True):
            sign = moments[0, 0, 0].sign()
            (index,) = (written[:, 0, 0] == moments[0, 0, 0].abs()).nonzero().flatten().tolist()
            assert torch.equal(features, sign * written[index])
            seen.add((index, sign.item()))
    assert {index for index, _ in seen} == set(range(6)) and {sign for _, sign in seen} == {-1.0, 1.0}


def test_with_buckets_each_size_has_the_features_of_its_tokens(tmp_path):
    batches = [make_batch(2, 4), make_batch(4, 4)]
    options = {"latent_sizes": SIZES, "stored": {"dtype": "bfloat16"}}
    info = write(tmp_path / "latents", batches, **options)
    assert [info.patch_features.num_bytes(*size) for size in SIZES] == [12, 24]
    for streaming in (False, True):
        dataset = open_latents(tmp_path / "latents", streaming=streaming).with_features()
        shapes = {(batch["moments"].shape[2:], batch["features"].shape[1:]) for batch in take(dataset)}
        assert shapes == {((2, 4), (2, 3)), ((4, 4), (4, 3))}
        assert take(dataset, 1)[0]["features"].dtype == torch.bfloat16


def test_latents_without_features_have_the_description_that_they_had(tmp_path):
    plain = {"patch_features": None, "format_version": 1, "has_flipped": False}
    write(tmp_path / "latents", [make_batch()], **plain)
    assert "patch_features" not in json.loads((tmp_path / "latents" / "latents.json").read_text())
    with pytest.raises(ValueError, match="Expected latents with a vision encoder's features, got none"):
        open_latents(tmp_path / "latents").with_features()


def test_an_alignment_with_another_encoder_or_other_patches_is_told_what_differs(whole):
    stored = LatentsInfo.load(whole[0]).patch_features
    stored.check_wanted({"encoder": ENCODER, "patch_size": 2})
    with pytest.raises(ValueError, match=r"\(ant, patch size 2\), got others \(patch_size: 2 there, 1 now\)"):
        stored.check_wanted({"encoder": ENCODER, "patch_size": 1})
    with pytest.raises(ValueError, match="encoder.fingerprint: '0+' there, '1' now"):
        stored.check_wanted({"encoder": ENCODER | {"fingerprint": "1"}, "patch_size": 2})


def test_what_is_not_as_the_folder_says_is_not_written(tmp_path):
    batch = make_batch()
    batch["features_flipped"] = batch["features_flipped"].float()
    batch["features_flipped"][1, 2, 0] = 70000.0  # more than float16 holds
    with pytest.raises(ValueError, match="finite values in float16, got others for image 1.*features_dtype bfloat16"):
        write(tmp_path / "infinite", [batch])
    with pytest.raises(ValueError, match=r"Expected features \[4, 3\], got \[3, 3\]"):
        write(tmp_path / "short", [make_batch() | {"features": torch.zeros(3, 3, 3)}])
    with pytest.raises(ValueError, match=r"multiples of the features' patch_size 3, got \[4, 4\]"):
        write(tmp_path / "odd", [make_batch()], stored={"patch_size": 3})


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float64"}, {"dtype": ["float16"]}, {"width": 0}, {"width": 3.0}, {"width": 4}, {"width": 2**40},
        {"patch_size": 4}, {"patch_size": 3}, {"patch_size": True}, {"encoder": None}, {"name_or_path": 3},
        {"revision": []}, {"more": 1}, None,
    ],
)  # fmt: skip
def test_fields_of_latents_json_that_cannot_be_are_refused(folder, changes):
    values = json.loads((folder / "latents.json").read_text())
    values["patch_features"] = "ant" if changes is None else values["patch_features"] | changes
    (folder / "latents.json").write_text(json.dumps(values))
    for refused in (open_latents, verify_latents):
        with pytest.raises(ValueError, match="^Expected"):
            refused(folder)


def rewrite(folder, features):
    """A shard with other features, of which latents.json knows."""
    values, path = json.loads((folder / "latents.json").read_text()), folder / "data" / "train-00001-of-00002.arrow"
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all()
    place = table.schema.get_field_index("features")
    table = table.set_column(place, table.schema.field(place), [pa.array(features, pa.large_binary())])
    with open(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    values["shards"][1] |= {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "latents.json").write_text(json.dumps(values))


@pytest.mark.parametrize("features", [[bytes(24)] * 2 + [bytes(22)], [bytes(24), None, bytes(24)], [b""] * 3])
def test_shards_with_other_lengths_are_refused_by_name(folder, features):
    rewrite(folder, features)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="00001-of-00002.arrow, which has"):
            open_latents(folder, streaming=streaming)
    with pytest.raises(ValueError, match="00001-of-00002.arrow, which has"):
        verify_latents(folder)


def test_verification_finds_values_that_are_not_finite(folder):
    rewrite(folder, [bytes(24), bytes(22) + b"\x00\x7e", bytes(24)])
    with pytest.raises(ValueError, match="00001-of-00002.arrow, which has values that are not finite"):
        verify_latents(folder)
