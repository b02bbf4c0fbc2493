# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Captions of repositories, folders with metadata and webdataset tars, and which of several is drawn."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice

import PIL.Image
import pytest

from diffusers_tread.data import CaptionColumns, make_batches, open_images, open_source, parse_caption_columns


datasets = pytest.importorskip("datasets")
TEXT = parse_caption_columns("text")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def png(shade):
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, rows, kind="jsonl"):
    """Images of shade 10, 20, ... in folders whose names look like splits, and the metadata."""
    for index, row in enumerate(rows, 1):
        path = folder / row["file_name"]
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(png(10 * index))
    table = datasets.Dataset.from_list(rows)
    getattr(table, {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(str(folder / f"metadata.{kind}"))
    return folder


def rows(*captions):
    return [{"file_name": f"test/val_{place}.png", "text": caption} for place, caption in enumerate(captions)]


def write_tars(folder):
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(4 * shard + 1, 4 * shard + 5):
                texts = {"caption": f"long {index}", "size": {"width": 8}}
                for kind, data in (("png", png(10 * index)), ("txt", f"{index}"), ("json", json.dumps(texts))):
                    entry, data = tarfile.TarInfo(f"{index:03}.{kind}"), data if kind == "png" else data.encode()
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def take(source, count, batch_size=3, **options):
    return list(islice(source.batches(batch_size=batch_size, seed=0, **options), count))


def shades(batch):
    return [round((float(pixels[0, 0, 0]) + 1) * 127.5) for pixels in batch["pixel_values"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_metadata_gives_every_image_its_caption(tmp_path, kind, streaming):
    write_folder(tmp_path, rows("n1", "n2", "n3", "n4", "n5"), kind)
    source = open_source(f"folder:{tmp_path}", captions=TEXT, resolution=8, streaming=streaming)
    assert (source.num_classes, source.id2label, source.has_captions, source.sizes) == (0, {}, True, ((8, 8),))
    batches = take(source, 5)
    captions = [caption for batch in batches for caption in source.conditions(batch)["captions"]]
    assert captions == [f"n{shade // 10}" for batch in batches for shade in shades(batch)]
    assert Counter(captions) == dict.fromkeys(("n1", "n2", "n3", "n4", "n5"), 3) and len(set(captions[:5])) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_give_captions_of_text_files_and_keys_of_json_ones_and_go_on_exactly(tmp_path, streaming):
    columns = CaptionColumns(("txt", "json.caption"), (0.5, 0.5))
    options = {"captions": columns, "image_column": "png", "resolution": 8, "streaming": streaming}
    source = open_source(f"hub:{write_tars(tmp_path / 'tars')}", shuffle_buffer=3, **options)
    whole = take(source, 16)
    for batch in whole:
        for caption, shade in zip(batch["captions"], shades(batch), strict=True):
            assert caption in (f"{shade // 10}", f"long {shade // 10}")
    long = sum(caption.startswith("long") for batch in whole for caption in batch["captions"])
    assert 8 < long < 40  # of 48
    if streaming:
        rest = take(source, 11, stream_positions=[whole[4]["position"]])
    else:
        rest = take(source, 11, samples_seen=15)
    assert [batch["captions"] for batch in rest] == [batch["captions"] for batch in whole[5:]]


def test_captions_are_drawn_with_their_probabilities_from_seed_epoch_place_and_rank():
    columns = parse_caption_columns("long:0.7, short:0.2, list:0.1")
    record = {"long": "a", "short": "b", "list": ["c", " ", "d"]}
    draw = {"seed": 0, "epoch": 0, "place": 0, "rank": 0}
    for key in draw:
        drawn = [columns.choose(record, **{**draw, key: value}) for value in range(4000)]
        counts = Counter(drawn)
        for caption, share in {"a": 0.7, "b": 0.2, "c": 0.05, "d": 0.05}.items():
            assert abs(counts[caption] - 4000 * share) < 4.5 * (4000 * share * (1 - share)) ** 0.5
        assert drawn == [columns.choose(record, **{**draw, key: value}) for value in range(4000)]


@pytest.mark.parametrize("text", ["", "a,a", "a,b", "a:0.5,b:0.4", "a:1.5,b:-0.5", "a:x", ":1", "a:nan"])
def test_columns_without_names_or_with_wrong_probabilities_are_refused(text):
    with pytest.raises(ValueError, match="caption columns"):
        parse_caption_columns(text)


def test_a_column_whose_name_has_a_point_wins_over_a_key():
    columns = parse_caption_columns("a.b")
    assert columns.columns({"a": {"b": None}}) == ["a"] and columns.columns({"a": {"b": None}, "a.b": None}) == ["a.b"]
    assert columns.choose({"a": {"b": "key"}}, seed=0, epoch=0, place=0) == "key"
    assert columns.choose({"a": {"b": "key"}, "a.b": "column"}, seed=0, epoch=0, place=0) == "column"


def test_data_without_captions_are_refused_before_any_work(tmp_path):
    folder = write_folder(tmp_path / "set", rows("one", " ", None, "four"))
    with pytest.raises(ValueError, match=r"column 'text', got none in 2 of 4 rows, the first of them row 1\."):
        open_images(train_data_dir=str(folder), captions=TEXT)
    with pytest.raises(ValueError, match=r"caption column 'prompt', got \['image', 'text'\]"):
        open_images(train_data_dir=str(folder), captions=parse_caption_columns("prompt"))
    with pytest.raises(ValueError, match=r"'json.text', got \[.*'json.caption', 'json.size', 'png', 'txt'\]"):
        tars = str(write_tars(tmp_path / "tars"))
        open_images(tars, image_column="png", captions=parse_caption_columns("json.text"), streaming=True)
    with pytest.raises(ValueError, match="no num_classes with captions"):
        open_images(train_data_dir=str(folder), captions=TEXT, num_classes=3, streaming=True)
    with pytest.raises(ValueError, match=r"metadata.parquet in .*, got val_0.png, .*val_3.png\. "):
        open_images(train_data_dir=str(folder), captions=TEXT, split="test")
    (folder / "metadata.csv").touch()
    with pytest.raises(ValueError, match="got metadata.jsonl, metadata.csv"):
        open_images(train_data_dir=str(folder), captions=TEXT)
    with pytest.raises(ValueError, match=r"options \['captions'\]"):
        open_source("digits:", captions=TEXT)


def test_a_stream_names_the_record_without_a_caption(tmp_path):
    source = open_source(
        f"folder:{write_folder(tmp_path, rows('one', ''))}", captions=TEXT, resolution=8, streaming=True
    )
    with pytest.raises(ValueError, match="got none in record [01] of epoch 0"):
        take(source, 1)


def test_class_folders_stay_class_folders_beside_metadata(tmp_path):
    write_folder(tmp_path, [{"file_name": "ant/1.png", "text": "an ant"}, {"file_name": "bee/1.png", "text": "a bee"}])
    source = open_source(f"folder:{tmp_path}", resolution=8)
    assert source.id2label == {0: "ant", 1: "bee"} and not source.has_captions
    assert next(make_batches(source.dataset, batch_size=2, seed=0))["class_labels"].sort().values.tolist() == [0, 1]
