# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Folders of latents with captions, what a text encoder made of these, and aspect-ratio buckets."""

import json
import shutil
import struct
from itertools import islice

import pyarrow as pa
import pytest
import torch

from diffusers_tread.data import (
    CaptionColumns,
    LatentsInfo,
    LatentsWriter,
    make_batches,
    open_latents,
    open_training_data,
    verify_latents,
)
from diffusers_tread.data.latents.text import describe_empty
from diffusers_tread.files import file_sha256


pytest.importorskip("datasets")

SIZES = ((2, 3), (3, 2), (3, 3))
COUNTS, PLACES = (5, 3, 4, 2), (0, 1, 0, 2)  # of the shards
BOTH = CaptionColumns(("long", "short"), (0.7, 0.3))


def encode(caption):
    """Arrays of every dtype; the number of words sets their lengths, but for that of one."""
    generator = torch.Generator().manual_seed(len(caption))
    values = torch.randn(len(caption.split()), 4, generator=generator)
    pooled = torch.randn(6, generator=generator)
    mask, ids = values[:, 0] > 0, (values[:, 1] * 100).long()
    return {"0": values.bfloat16(), "1": pooled, "2": mask, "3": values.half(), "4": ids, "5": ids.int()}


def make_records():
    """14 records, in the order of the shards."""
    records = []
    for place, count in zip(PLACES, COUNTS, strict=True):
        for _ in range(count):
            index = len(records)
            captions = {"long": "a long caption " * (1 + index % 3) + str(index), "short": f"short {index}"}
            records.append({"moments": torch.randn(4, *SIZES[place]).half(), "captions": captions})
    return records


def write(folder, records, **changes):
    text, content = describe_empty({"pipeline_class": "AntPipeline"}, encode(""))
    fields = {
        "kind": "moments", "dtype": "float16", "latent_channels": 2, "latent_size": 3, "resolution": 24,
        "scaling_factor": 0.5, "vae": {}, "source": {}, "id2label": {}, "num_samples": 1, "shards": (),
        "captions": ("long", "short"), "text": text, "latent_sizes": SIZES, "format_version": 2,
    }  # fmt: skip
    info = LatentsInfo(**fields | changes)
    writer = LatentsWriter(folder, info, num_shards=len(COUNTS), size_places=PLACES, empty_text=content)
    for shard in writer.open({}):
        part = records[sum(COUNTS[:shard]) :][: COUNTS[shard]]
        captions = {name: [record["captions"][name] for record in part] for name in info.captions}
        batch = {
            "names": [f"image {index}" for index in range(len(part))],
            "unreadable": [],
            "moments": torch.stack([record["moments"] for record in part]),
            "captions": captions,
            "text": {name: [encode(caption) for caption in texts] for name, texts in captions.items()},
        }
        writer.write(shard, [batch])
    return writer.finish()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "latents"
    records = make_records()
    write(folder, records)
    return folder, records


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "latents")


def take(dataset, count, **options):
    return list(islice(make_batches(dataset, **{"batch_size": 2, "seed": 0} | options), count))


def assert_equal_arrays(arrays, others):
    assert arrays.keys() == others.keys()
    for name, values in arrays.items():
        assert values.dtype == others[name].dtype and torch.equal(values, others[name])


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch["captions"] == other["captions"] and batch.get("position") == other.get("position")
        assert torch.equal(batch["moments"], other["moments"])
        for arrays, its_arrays in zip(batch["text"], other["text"], strict=True):
            assert_equal_arrays(arrays, its_arrays)


@pytest.mark.parametrize("streaming", [False, True])
def test_records_come_back_bit_for_bit_in_batches_of_one_size(made, streaming):
    folder, records = made
    dataset = open_training_data(latents_dir=str(folder), captions=BOTH, streaming=streaming, shuffle_buffer=4)
    assert (dataset.num_classes, dataset.id2label, dataset.resolution) == (0, {}, 24)
    assert dataset.info.sizes == ((16, 24), (24, 16), (24, 24))
    assert_equal_arrays(dataset.empty_text, encode(""))

    seen, drawn = set(), set()
    for batch in take(dataset, 60):
        assert batch["moments"].dtype == torch.float16 and "class_labels" not in batch
        for moments, caption, arrays in zip(batch["moments"], batch["captions"], batch["text"], strict=True):
            index = int(caption.split()[-1])
            column = "short" if caption.startswith("short") else "long"
            assert caption == records[index]["captions"][column]
            assert torch.equal(moments, records[index]["moments"])
            assert_equal_arrays(arrays, encode(caption))
            seen.add(index)
            drawn.add((index, column))
    assert seen == set(range(14)) and len(drawn) > 20  # other captions of a record in other epochs


def test_training_goes_on_from_a_sample_or_a_streams_position(made):
    folder, _ = made
    dataset = open_latents(folder, captions=BOTH)
    whole = take(dataset, 20)
    assert_same(take(dataset, 13, samples_seen=14), whole[7:])
    assert_same(take(dataset, 5, num_workers=1), whole[:5])
    halves = [take(dataset, 8, batch_size=1, rank=rank, num_ranks=2) for rank in range(2)]
    for parts, batch in zip(zip(*halves, strict=True), whole, strict=False):
        assert torch.equal(torch.cat([part["moments"] for part in parts]), batch["moments"])

    stream = open_latents(folder, captions=BOTH, streaming=True, shuffle_buffer=3)
    whole = take(stream, 20)
    for start in (3, 11):
        assert_same(take(stream, 20 - start, stream_positions=[whole[start - 1]["position"]]), whole[start:])


def test_one_caption_column_is_read_and_others_or_labels_are_refused(made):
    short = CaptionColumns(("short",), (1.0,))
    (batch,) = take(open_latents(made[0], captions=short), 1)
    assert all(caption.startswith("short") for caption in batch["captions"])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"captions of \['long', 'short'\], got none"):
            open_latents(made[0], streaming=streaming)
        with pytest.raises(ValueError, match=r"among \['long', 'short'\].*got \['alt'\]"):
            open_latents(made[0], captions=CaptionColumns(("alt",), (1.0,)), streaming=streaming)
    info = LatentsInfo.load(made[0])
    info.text.check_encoder({"pipeline_class": "AntPipeline"})
    with pytest.raises(ValueError, match="pipeline_class: 'AntPipeline' there, 'BeePipeline' now"):
        info.text.check_encoder({"pipeline_class": "BeePipeline"})
    with pytest.raises(ValueError, match="buckets"):
        open_training_data(latents_dir=str(made[0]), captions=short, buckets=object())


def test_what_is_not_as_the_folder_says_is_not_written(tmp_path):
    records = make_records()
    records[6] |= {"captions": {"long": "a", "short": " "}}
    with pytest.raises(ValueError, match="Expected a caption in column 'short', got none for image 1"):
        write(tmp_path / "empty", records)
    text, _ = describe_empty({}, {"0": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="Expected arrays"):
        write(tmp_path / "other", make_records(), text=text)
    records = make_records()
    records[5]["moments"] = records[6]["moments"] = records[7]["moments"] = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match=r"00001-of-00004.arrow, which has latents of other sizes, \[\(2, 3\)\]"):
        write(tmp_path / "sizes", records)


def set_fields(**fields):
    return lambda values: values.update(fields)


def set_text(name, value):
    return lambda values: values["text"].__setitem__(name, value)


def set_shape(*shape):
    return lambda values: values["text"]["arrays"]["0"].__setitem__("shape", list(shape))


def set_shard(name, value):
    return lambda values: values["shards"][1].__setitem__(name, value)


@pytest.mark.parametrize(
    "change",
    [
        set_fields(format_version=1),
        set_fields(captions=[]),
        set_fields(captions=["long", "long"]),
        set_fields(captions=["long", "long.0"]),
        set_fields(captions=["long", "a\nb"]),
        set_fields(captions=["long", 3]),
        set_fields(captions=["long", "moments"]),
        set_fields(latent_sizes=[]),
        set_fields(latent_sizes=[[2, 3], [3, 2]]),
        set_fields(latent_sizes=[[2, 3], [3, 2], [3, 3], [1, 3]]),
        set_fields(latent_sizes=[[2, 3], [3, 2], [-3, -3]]),
        set_fields(latent_sizes=[[2, 3], [3, 2], [3, 3], [4, 3]]),
        set_fields(latent_sizes=[[2, 3], [3, 2], [3, 3, 1]]),
        set_fields(latent_sizes=3),
        set_fields(resolution=25),
        set_fields(text={}),
        set_fields(text="text"),
        set_text("encoder", None),
        set_text("arrays", {}),
        set_text("arrays", {"../0": {"dtype": "float16", "shape": [None]}}),
        set_text("arrays", {"0": {"dtype": "object", "shape": [None]}}),
        set_text("empty", {"size": 3}),
        set_text("more", 1),
        set_shape(),
        set_shape(3, 4),
        set_shape(None, -4),
        set_shape(None, 0),
        set_shape(None, 4.0),
        set_shape(None, 2**20, 2**20),
        set_shard("latent_size", [3, 3]),
        set_shard("latent_size", [4, 4]),
        set_shard("latent_size", [-3, -2]),
        set_shard("latent_size", None),
        lambda values: values["shards"][1].pop("latent_size"),
        lambda values: values["text"]["arrays"]["0"].update(dtype="float16"),
        lambda values: values["text"]["arrays"].update({"0": {"dtype": "bfloat16", "shape": [None, 3]}}),
    ],
)
def test_fields_of_latents_json_that_cannot_be_are_refused(folder, change):
    values = json.loads((folder / "latents.json").read_text())
    change(values)
    (folder / "latents.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="^Expected"):
        open_latents(folder, captions=BOTH)


def test_the_empty_captions_file_is_not_trusted(folder):
    path = folder / "text_empty.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    for damage in (lambda: path.write_bytes(content), path.unlink):
        damage()
        for refused in (lambda: open_latents(folder, captions=BOTH), lambda: verify_latents(folder)):
            with pytest.raises(ValueError, match="empty caption's embedding as it was written"):
                refused()


def lists(values):
    return lambda old: pa.array(values, old.type)


BLANK = lists(["a", " ", "c"])


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("moments", lambda old: pa.concat_arrays([old[:2], lists([[1.0] * 23])(old)]), "of another length"),
        ("height", lists([3, 3, 2]), "other sizes"),
        ("short", lists(["a", "", "c"]), "records without 'short'"),
        ("short", lists(["a", None, "c"]), "records without values"),
        ("long.0", lists([b"x" * 8, b"x" * 8, b"x" * 12]), "another length of 'long.0'"),
        ("long.1", lists([struct.pack("<6f", *[float("nan")] * 6)] * 3), "not finite"),
        ("short", BLANK, "records without 'short'"),
    ],
)
def test_a_shard_that_lies_is_named(folder, column, change, message):
    path = folder / "data" / "train-00001-of-00004.arrow"
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        table = stream.read_all().combine_chunks()
    place = table.schema.names.index(column)
    table = table.set_column(place, table.schema.field(place), change(table.column(column).chunk(0)))
    with open(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    values = json.loads((folder / "latents.json").read_text())
    values["shards"][1] |= {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "latents.json").write_text(json.dumps(values))
    its_values = message == "not finite" or change is BLANK  # which only a verification reads
    for refused in [lambda: verify_latents(folder)] + [lambda: open_latents(folder, captions=BOTH)] * (not its_values):
        with pytest.raises(ValueError, match=f"train-00001-of-00004.arrow, which .*{message}"):
            refused()
