# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Images that change under their latents: shards made of them are made again, finished folders refused."""

import os

import PIL.Image
import pytest
import torch

from diffusers_tread.data import LatentsInfo, LatentsWriter
from diffusers_tread.data.latents.encoding import digest_sources
from diffusers_tread.data.latents.writing import digest_files


datasets = pytest.importorskip("datasets")

INFO = LatentsInfo(
    kind="latents", dtype="float32", latent_channels=1, latent_size=2, resolution=4, scaling_factor=1.0, vae={},
    source={}, id2label={0: "ant"}, num_samples=1, shards=(),
)  # fmt: skip


def save(path, colour, size=(8, 8)):
    PIL.Image.new("RGB", size, colour).save(path)


def make_source(images):
    """As `open_images` returns it."""
    return datasets.Dataset.from_dict(
        {"photo": images}, features=datasets.Features({"photo": datasets.Image(decode=False)})
    )


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def write(folder, shards, sources):
    writer = LatentsWriter(folder, INFO, num_shards=3)
    missing = writer.open({}, sources=sources)
    for shard in set(missing) & set(shards):
        writer.write(shard, [{"names": ["a"], "unreadable": [], "label": [0], "moments": torch.ones(1, 1, 2, 2)}])
    return writer, missing


@pytest.mark.parametrize(
    "change",
    [
        touch,
        lambda path: save(path, "white"),
        lambda path: save(path, "black", (9, 8)),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("other.png")),
    ],
)
def test_a_changed_image_changes_the_digest_of_its_shard_alone(tmp_path, change):
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path in paths:
        save(path, "black")
    rows = make_source([{"bytes": None, "path": str(path)} for path in paths])
    before = digest_sources(rows, image_column="photo", plan=[range(2), range(2, 4), range(4, 5)])
    assert (
        before == digest_sources(rows, image_column="photo", plan=[range(2), range(2, 4), range(4, 5)])
        and len(set(before)) == 3
    )
    change(paths[3])
    after = digest_sources(rows, image_column="photo", plan=[range(2), range(2, 4), range(4, 5)])
    assert [was == now for was, now in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("image", [{"bytes": b"other", "path": "1.png"}, {"bytes": b"", "path": "1.png"}, None])
def test_images_inside_a_data_set_are_told_by_their_content(image):
    rows = [{"bytes": bytes([index]), "path": f"{index}.png"} for index in range(4)]
    before = digest_sources(make_source(rows), image_column="photo", plan=[[0], [1], [2], [3]])
    after = digest_sources(make_source([rows[0], image, *rows[2:]]), image_column="photo", plan=[[0], [1], [2], [3]])
    assert [was == now for was, now in zip(before, after, strict=True)] == [True, False, True, True]


def test_an_unfinished_folder_makes_the_changed_shards_again(tmp_path):
    _, missing = write(tmp_path, [0, 1], ["a", "b", "c"])
    assert missing == [0, 1, 2]
    writer, missing = write(tmp_path, [1, 2], ["a", "B", "c"])
    assert missing == [1, 2]
    assert writer.finish().num_samples == 3
    assert write(tmp_path, [], ["a", "B", "c"])[1] == []


@pytest.mark.parametrize("sources", [["a", "B", "c"], ["A", "B", "C"], None])
def test_a_finished_folder_of_other_sources_is_refused(tmp_path, sources):
    writer, _ = write(tmp_path, [0, 1, 2], ["a", "b", "c"])
    writer.finish()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match="got others under the same names.*train-00001-of-00003.*Use another folder"):
        write(tmp_path, [], sources)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_files_are_told_by_name_size_and_time(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"tar")
    digests = {digest_files([path])}
    touch(path)
    digests.add(digest_files([path]))
    path.write_bytes(b"longer")
    digests.add(digest_files([path]))
    digests.add(digest_files([tmp_path / "1.tar"]))
    assert len(digests) == 4


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"shard_sources": 3}'])
def test_settings_and_records_that_are_damaged_are_no_trace_back(tmp_path, text):
    writer, _ = write(tmp_path, [0, 1], ["a", "b", "c"])
    next((tmp_path / "unfinished").glob("train-00001*")).write_text(text)
    assert write(tmp_path, [], ["a", "b", "c"])[1] == [1, 2]
    with pytest.raises(ValueError, match="Expected every shard.*train-00001.*train-00002.*Run the same command"):
        writer.finish()
    (tmp_path / "latents_config.json").write_text(text)
    with pytest.raises(ValueError, match="Expected .*latents_config.json|Expected a new folder"):
        write(tmp_path, [], ["a", "b", "c"])
