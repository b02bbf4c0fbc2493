# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_tread.data import LatentsInfo, LatentsWriter, verify_latents
from diffusers_tread.files import file_sha256


datasets = pytest.importorskip("datasets")

INFO = LatentsInfo(
    kind="moments", dtype="float16", latent_channels=2, latent_size=3, resolution=24, scaling_factor=0.5,
    shift_factor=0.25, vae={"name_or_path": "vae"}, source={"train_data_dir": "images"}, id2label={0: "ant", 1: "bee"},
    num_samples=1, shards=(),
)  # fmt: skip
SETTINGS = {"shard_size": 100}


def make_batch(seed, size, *, unreadable=(), flipped=False):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "names": [f"image {seed}.{index}" for index in range(size)],
        "moments": torch.randn(size, 4, 3, 3, generator=generator),
        "label": [index % 2 for index in range(size)],
        "unreadable": list(unreadable),
    }
    if flipped:
        batch["moments_flipped"] = torch.randn(size, 4, 3, 3, generator=generator)
    return batch


def write(folder, *, shards=2, info=INFO, **options):
    """A finished folder of shards of 5 records."""
    writer = LatentsWriter(folder, info, num_shards=shards, **options)
    for shard in writer.open(SETTINGS):
        writer.write(shard, [make_batch(shard, 5, flipped=info.has_flipped)])
    return writer.finish()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_plain_datasets_reads_what_was_written_exactly_but_for_the_cast(tmp_path, dtype):
    info = write(tmp_path / "latents", info=dataclasses.replace(INFO, dtype=dtype, has_flipped=True))
    records = datasets.load_dataset(str(tmp_path / "latents"), split="train", cache_dir=str(tmp_path / "cache"))
    assert records.features == info.features() and len(records) == info.num_samples == 10
    table = records.with_format("arrow")[:]
    for column in ("moments", "moments_flipped"):
        expected = torch.cat([make_batch(seed, 5, flipped=True)[column] for seed in range(2)]).to(info.torch_dtype)
        values = torch.tensor(table[column].combine_chunks().flatten().to_numpy())
        values = values.view(torch.bfloat16) if dtype == "bfloat16" else values
        assert values.dtype == info.torch_dtype and torch.equal(values.view(-1, *info.shape), expected)
    assert table["label"].to_pylist() == [0, 1, 0, 1, 0] * 2


def test_latents_json_says_what_was_found_and_comes_back_the_same(tmp_path):
    info = write(tmp_path / "latents")
    assert LatentsInfo.load(tmp_path / "latents") == info
    assert dataclasses.replace(info, num_samples=1, shards=()) == INFO
    assert [shard["file"] for shard in info.shards] == [f"data/train-0000{k}-of-00002.arrow" for k in range(2)]
    assert sorted(contents(tmp_path / "latents")) == [
        "latents.json", "latents_config.json", *(Path(shard["file"]).name for shard in info.shards),
    ]  # fmt: skip


@pytest.mark.parametrize(("more", "last"), [(0, 22), (41, 63), (42, 64), (43, 65)])
def test_the_bytes_do_not_depend_on_how_the_records_are_batched(tmp_path, more, last):
    whole = make_batch(0, 150 + more)
    parts = [
        {key: value[start:stop] for key, value in whole.items() if key != "unreadable"} | {"unreadable": []}
        for start, stop in ((0, 1), (1, 90), (90, 90), (90, 150 + more))
    ]
    for name, batches in (("whole", [whole]), ("parts", parts)):
        writer = LatentsWriter(tmp_path / name, INFO, num_shards=1)
        assert writer.open(SETTINGS) == [0]
        writer.write(0, batches)
        writer.finish()
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    table = datasets.Dataset.from_file(str(tmp_path / "whole" / "data" / "train-00000-of-00001.arrow")).data
    assert [batch.num_rows for batch in table.to_batches()] == [64, 64, *([last] if last <= 64 else [64, last - 64])]


def test_what_is_whole_is_kept_and_the_rest_is_written_again(tmp_path):
    write(tmp_path / "whole", shards=4)
    writer = LatentsWriter(tmp_path / "latents", INFO, num_shards=4)
    assert writer.open(SETTINGS) == [0, 1, 2, 3]
    for shard in (0, 2, 3):
        writer.write(shard, [make_batch(shard, 5)])

    # Shard 2 is cut off, 3 was published without its record, 1 is half-written.
    shards = [tmp_path / "latents" / file for file in writer.files]
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    (tmp_path / "latents" / "unfinished" / f"{shards[3].stem}.json").unlink()
    shards[1].with_name(shards[1].name + ".tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="Expected a folder of latents with a latents.json"):
        verify_latents(tmp_path / "latents")

    kept = shards[0].stat().st_mtime_ns
    again = LatentsWriter(tmp_path / "latents", INFO, num_shards=4)
    assert again.open(SETTINGS) == [1, 2, 3]
    for shard in (3, 1, 2):
        again.write(shard, [make_batch(shard, 5)])
    again.finish()
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")
    assert shards[0].stat().st_mtime_ns == kept
    assert LatentsWriter(tmp_path / "latents", INFO, num_shards=4).open(SETTINGS) == []


def test_unreadable_images_are_remembered_over_a_kill_and_limited(tmp_path):
    writer = LatentsWriter(tmp_path, INFO, num_shards=2, max_unreadable=1)
    writer.open(SETTINGS)
    writer.write(1, [make_batch(1, 5, unreadable=["image 9"])])
    writer = LatentsWriter(tmp_path, INFO, num_shards=2, max_unreadable=1)
    assert writer.open(SETTINGS) == [0]
    writer.write(0, [make_batch(0, 4, unreadable=["image 4"])])
    with pytest.raises(ValueError, match="at most 1 unreadable images, got 2, the last of them image 9"):
        writer.finish()

    # With a higher limit nothing is left to write.
    writer = LatentsWriter(tmp_path, INFO, num_shards=2, max_unreadable=2)
    assert writer.open(SETTINGS) == []
    info = writer.finish()
    assert info.unreadable == ("image 4", "image 9") and info.num_samples == 9


def test_too_many_unreadable_images_stop_the_process_that_meets_them(tmp_path):
    writer = LatentsWriter(tmp_path, INFO, num_shards=3, max_unreadable=1)
    writer.open(SETTINGS)
    writer.write(0, [make_batch(0, 5, unreadable=["image 0"])])
    with pytest.raises(ValueError, match="at most 1 unreadable images, got 2"):
        writer.write(1, [make_batch(1, 2, unreadable=["image 7"]), make_batch(2, 3)])
    assert [path.name for path in (tmp_path / "data").iterdir()] == [Path(writer.files[0]).name]


def test_a_shard_of_unreadable_images_only_is_an_error(tmp_path):
    writer = LatentsWriter(tmp_path, INFO, num_shards=1, max_unreadable=9)
    writer.open(SETTINGS)
    with pytest.raises(ValueError, match="Expected a readable image in every shard, got only unreadable ones"):
        writer.write(0, [{"names": [], "unreadable": ["image 0"]}])
    writer.write(0, [{"names": [], "unreadable": ["image 0"]}, make_batch(1, 5)])
    assert writer.finish().num_samples == 5


@pytest.mark.parametrize(
    ("value", "fits"), [(1e5, ("bfloat16", "float32")), (3.4e38, ("float32",)), (float("nan"), ())]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_value_that_the_dtype_cannot_hold_is_an_error_that_names_the_image(tmp_path, dtype, value, fits):
    batch = make_batch(0, 5)
    batch["moments"][3, 1, 2, 0] = value
    writer = LatentsWriter(tmp_path, dataclasses.replace(INFO, dtype=dtype), num_shards=1)
    writer.open(SETTINGS)
    if dtype in fits:
        writer.write(0, [batch])
        assert writer.finish().num_samples == 5
    else:
        with pytest.raises(ValueError, match=f"finite values in {dtype}, got others for image 0.3. Write bfloat16"):
            writer.write(0, [batch])
        assert list((tmp_path / "data").iterdir()) == list((tmp_path / "unfinished").iterdir()) == []


def test_a_full_disk_leaves_whole_shards_and_says_how_to_go_on(tmp_path):
    writer = LatentsWriter(tmp_path, INFO, num_shards=2)
    writer.open(SETTINGS)
    writer.write(0, [make_batch(0, 5)])
    # The kernel's own full device, in the place of the half-written file.
    (tmp_path / f"{writer.files[1]}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="run the same command, which goes on with the missing shards") as error:
        writer.write(1, [make_batch(1, 5)])
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "data").iterdir()] == [Path(writer.files[0]).name]
    assert LatentsWriter(tmp_path, INFO, num_shards=2).open(SETTINGS) == [1]


def test_a_process_killed_before_the_settings_were_there_leaves_a_folder_to_begin_in(tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "latents_config.json.tmp").write_text("{")
    assert LatentsWriter(tmp_path / "latents", INFO, num_shards=2).open(SETTINGS) == [0, 1]
    assert not list((tmp_path / "latents").rglob("*.tmp"))


def test_a_folder_of_other_latents_is_refused_with_what_differs(tmp_path):
    write(tmp_path / "latents")
    before = contents(tmp_path / "latents")
    other = dataclasses.replace(INFO, resolution=48, dtype="float32")
    with pytest.raises(ValueError, match="dtype: 'float16' there, 'float32' now; resolution: 24 there, 48 now"):
        LatentsWriter(tmp_path / "latents", other, num_shards=2).open(SETTINGS)
    with pytest.raises(ValueError, match="num_shards: 2 there, 3 now; shard_size: 100 there, 50 now"):
        LatentsWriter(tmp_path / "latents", INFO, num_shards=3).open({"shard_size": 50})
    assert contents(tmp_path / "latents") == before

    (tmp_path / "foreign" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="Expected a new folder, got .*foreign, which holds other data"):
        LatentsWriter(tmp_path / "foreign", INFO, num_shards=2).open(SETTINGS)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verification_names_every_shard_that_is_missing_cut_off_or_changed(tmp_path):
    info = write(tmp_path, shards=4)
    assert verify_latents(tmp_path) == verify_latents(tmp_path, checksums=False) == info
    files = [tmp_path / shard["file"] for shard in info.shards]
    damage(files[3])
    assert verify_latents(tmp_path, checksums=False) == info
    with pytest.raises(ValueError, match="00003-of-00004.arrow, which has another SHA-256. Fetch"):
        verify_latents(tmp_path)
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-8])
    size = info.shards[1]["size"]
    missing = f"00000-of-00004.arrow, which is missing; .*00001-of-00004.arrow, which has {size - 8} bytes"
    for checksums in (True, False):
        with pytest.raises(ValueError, match=missing):
            verify_latents(tmp_path, checksums=checksums)
    with pytest.raises(ValueError, match=missing):
        LatentsWriter(tmp_path, INFO, num_shards=4).finish()


def test_a_shard_that_reads_back_otherwise_keeps_the_folder_unfinished(tmp_path):
    writer = LatentsWriter(tmp_path, INFO, num_shards=2)
    for shard in writer.open(SETTINGS):
        writer.write(shard, [make_batch(shard, 5)])
    damage(tmp_path / writer.files[1])
    with pytest.raises(ValueError, match="00001-of-00002.arrow, which has another SHA-256. Run the same command"):
        writer.finish()
    assert not (tmp_path / "latents.json").exists()
    assert LatentsWriter(tmp_path, INFO, num_shards=2).open(SETTINGS) == [1]


def test_what_is_read_back_is_looked_at(tmp_path):
    """Labels and values that a caller or a bug put there, and a record that counts wrongly."""
    writer = LatentsWriter(tmp_path, dataclasses.replace(INFO, dtype="bfloat16"), num_shards=3)
    for shard in writer.open(SETTINGS):
        writer.write(shard, [make_batch(shard, 5) | ({"label": [0, 2, 0, 0, 0]} if shard == 0 else {})])

    def rewrite(shard, change):
        path = tmp_path / "unfinished" / f"{Path(writer.files[shard]).stem}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    rewrite(1, lambda record: record | {"num_samples": 6})
    # An infinity among the values of shard 2, with a checksum that agrees.
    path = tmp_path / writer.files[2]
    value = make_batch(2, 5)["moments"].bfloat16().view(torch.int16).numpy().astype(np.int16).tobytes()[:64]
    content = path.read_bytes()
    assert content.count(value) == 1
    content = content.replace(value, b"\x80\x7f" + value[2:])
    path.write_bytes(content)
    rewrite(2, lambda record: record | {"sha256": file_sha256(path)})
    with pytest.raises(ValueError) as error:
        writer.finish()
    assert "00000-of-00003.arrow, which has labels outside [0, 2)" in str(error.value)
    assert "00001-of-00003.arrow, which has 5 records" in str(error.value)
    assert "00002-of-00003.arrow, which has values that are not finite" in str(error.value)
