# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Folders of latents that somebody else made, or that were damaged since: every lie is refused, by name."""

import json
import shutil

import pyarrow as pa
import pytest
import torch

from diffusers_tread.data import LatentsInfo, LatentsWriter, latents_from_moments, open_latents, verify_latents
from diffusers_tread.files import file_sha256


datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "latents"
    info = LatentsInfo(
        kind="moments", dtype="float32", latent_channels=2, latent_size=3, resolution=24, scaling_factor=0.5,
        latents_mean=(1.0, 2.0), latents_std=(3.0, 4.0), vae={"name_or_path": "vae", "revision": None}, source={},
        id2label={0: "ant", 1: "bee"}, num_samples=1, shards=(),
    )  # fmt: skip
    writer = LatentsWriter(folder, info, num_shards=2)
    for shard in writer.open({}):
        batch = {"names": ["image"] * 3, "unreadable": [], "label": [0, 1, 1], "moments": torch.rand(3, 4, 3, 3)}
        writer.write(shard, [batch])
    writer.finish()
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "latents")


def rewrite(folder, change):
    values = json.loads((folder / "latents.json").read_text())
    change(values)
    (folder / "latents.json").write_text(json.dumps(values))


def set_field(name, value):
    return lambda values: values.__setitem__(name, value)


def set_shard(name, value):
    return lambda values: values["shards"][1].__setitem__(name, value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "file",
    [
        "../outside.arrow",
        "data/../../outside.arrow",
        "/etc/outside.arrow",
        "data/./train-00001-of-00002.arrow",
        "data\\outside.arrow",
        "~/outside.arrow",
        "data/*.arrow",
        "data/train-0000[0-1]-of-00002.arrow",
        "https://example.com/outside.arrow",
        "hf://datasets/ant/bee/outside.arrow",
        "data/train-00001-of-00002.arrow\n",
        "data/.hidden.arrow",
        "data/train.parquet",
        "data/train-00000-of-00002.arrow",  # named twice
        None,
        ["data/a.arrow"],
    ],
)
def test_shards_outside_the_folder_or_named_twice_are_refused(folder, file, streaming):
    (folder.parent / "outside.arrow").write_bytes(next((folder / "data").iterdir()).read_bytes())
    rewrite(folder, set_shard("file", file))
    with pytest.raises(ValueError, match="Expected a folder of latents.*(in the folder|named twice)"):
        open_latents(folder, streaming=streaming)


@pytest.mark.parametrize(
    "change",
    [
        set_field("num_samples", 7),
        set_field("num_samples", 6.0),
        set_field("num_samples", True),
        set_shard("num_samples", 4),
        set_shard("num_samples", 0),
        set_shard("size", -1),
        set_shard("size", "512"),
        set_shard("sha256", "0" * 63),
        set_shard("sha256", None),
        set_shard("more", 1),
        lambda values: values["shards"][0].pop("sha256"),
        lambda values: values["shards"].pop(),
        lambda values: values["shards"].append("data/a.arrow"),
        set_field("shards", []),
        set_field("shards", {"a": 1}),
        set_field("scaling_factor", 0.0),
        set_field("scaling_factor", -1.0),
        set_field("scaling_factor", float("nan")),
        set_field("scaling_factor", float("inf")),
        set_field("scaling_factor", "0.5"),
        set_field("scaling_factor", True),
        set_field("shift_factor", 0.1),
        set_field("shift_factor", None),
        set_field("latents_mean", None),
        set_field("latents_mean", [1.0]),
        set_field("latents_std", [1.0, 0.0]),
        set_field("latents_std", [1.0, "2"]),
        set_field("latents_std", [1.0, 2.0, 3.0]),
        lambda values: values.update(latents_mean=[1.0] * 3, latents_std=[1.0] * 3),
        set_field("latent_channels", 10**6),
        set_field("latent_size", 2**40),
        set_field("latent_size", 3.0),
        set_field("resolution", "24"),
        set_field("id2label", {}),
        set_field("id2label", {"0": "ant", "2": "bee"}),
        set_field("id2label", {"0": "ant", "00": "bee", "1": "cat"}),
        set_field("id2label", {"0": "ant", "1": None}),
        set_field("id2label", ["ant", "bee"]),
        set_field("unreadable", [3]),
        set_field("vae", "vae"),
        set_field("vae", {"name_or_path": ["a"]}),
        set_field("has_flipped", "yes"),
        set_field("format_version", True),
    ],
)
def test_counts_scales_and_types_that_cannot_be_are_refused(folder, change):
    rewrite(folder, change)
    for refused in (LatentsInfo.load, open_latents, verify_latents):
        with pytest.raises(ValueError, match="Expected a folder of latents with a latents.json.*got"):
            refused(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"kind": "latents", "kind": "moments"}', "\xff"]
)
def test_a_latents_json_that_is_none_is_refused(folder, text):
    (folder / "latents.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="Expected a folder of latents with a latents.json"):
        open_latents(folder)


def note(folder, shard):
    """Makes latents.json agree with a changed shard."""
    path = folder / "data" / f"train-0000{shard}-of-00002.arrow"

    def change(values):
        values["shards"][shard] |= {"size": path.stat().st_size, "sha256": file_sha256(path)}

    rewrite(folder, change)


def cut(path, info):
    path.write_bytes(path.read_bytes()[:700])


def break_a_message(path, info):
    content = bytearray(path.read_bytes())
    start = content.rindex(b"\xff\xff\xff\xff", 0, len(content) - 8)  # of the record batch
    content[start + 8 : start + 40] = b"\xff" * 32
    path.write_bytes(content)


def replace_by_text(path, info):
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)


def rewrite_with(**columns):
    def change(path, info):
        schema = info.features().arrow_schema
        arrays = {
            "moments": pa.array([[0.5] * 36] * 3, schema.field("moments").type),
            "label": pa.array([0, 1, 1]),
        }
        table = pa.table(arrays | {name: make(schema) for name, make in columns.items()})
        table = table.replace_schema_metadata(schema.metadata)
        with open(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

    return change


DAMAGE = [
    cut,
    break_a_message,
    replace_by_text,
    rewrite_with(moments=lambda schema: pa.array([[0.5] * 36, None, [0.5] * 36], schema.field("moments").type)),
    rewrite_with(label=lambda schema: pa.array([0, None, 1])),
    rewrite_with(label=lambda schema: pa.array(["0", "1", "1"])),
    rewrite_with(moments=lambda schema: pa.array([[0.5] * 35] * 3, pa.list_(pa.float32(), 35))),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_even_if_its_checksum_agrees(folder, damage, streaming):
    damage(folder / "data" / "train-00001-of-00002.arrow", LatentsInfo.load(folder))
    note(folder, 1)
    for refused in (lambda: open_latents(folder, streaming=streaming), lambda: verify_latents(folder)):
        with pytest.raises(ValueError, match="train-00001-of-00002.arrow") as error:
            refused()
        assert "train-00000" not in str(error.value)


def test_verification_looks_at_what_the_checksum_does_not_say(folder):
    path = folder / "data" / "train-00001-of-00002.arrow"
    rewrite_with(moments=lambda schema: pa.array([[float("nan")] * 36] * 3, schema.field("moments").type))(
        path, LatentsInfo.load(folder)
    )
    note(folder, 1)
    with pytest.raises(ValueError, match="train-00001-of-00002.arrow, which has values that are not finite"):
        verify_latents(folder)


def test_latents_that_hold_together_are_read_with_their_statistics(folder):
    dataset = open_latents(folder)
    batch = dataset.__getitems__([(0, index) for index in range(6)])
    mean, std = batch["moments"].chunk(2, dim=1)
    latents = latents_from_moments(batch["moments"], dataset.info, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    shift, scale = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(latents, (mean + std * noise - shift) * 0.5 / scale)
