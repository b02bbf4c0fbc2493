# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which files of a folder are images and of which class, for training and for evaluation alike."""

import os
import unicodedata
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest

from diffusers_tread.data import list_class_folders, list_images, open_images, open_training_data
from diffusers_tread.metrics import FolderImages


pytest.importorskip("datasets")


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".tga": "TGA", ".webp": "WEBP", ".jp2": "JPEG2000", ".qoi": None}.get(path.suffix, "PNG")
        PIL.Image.new("RGB", (16, 16), (len(name), 0, 0)).save(path, kind or "PNG")
    return root


def counted(root: Path, **options) -> Counter:
    """Images per class in training, seen to be as many in evaluation."""
    source, id2label = open_images(train_data_dir=str(root), **options)
    assert len(FolderImages(root / options.get("split", ""))) == len(source)
    return Counter(id2label[label] for label in source["label"])


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train"),
        ("train_interior", "alley", "valley"),
        ("test_tube", "validation", "eval"),
        ("train", "val", "test"),
        ("[ab]", "{x,y}*?", "100%"),
        ("été", "猫", "Ünïcode"),
        ("0", "10", "9"),
        ("dev-split", "data", "images"),
    ],
)
def test_the_top_folder_is_the_class_whatever_it_is_called(tmp_path, names):
    files = [f"{name}/{image}" for name in names for image in ("train.png", "test_1.png", "deep/er/val.png")]
    assert counted(write(tmp_path, *files)) == dict.fromkeys(names, 3)
    images = list_class_folders(tmp_path)
    assert images.names == sorted(names)
    assert images.labels == sorted(images.labels) and list_images(tmp_path) == images.paths


def test_what_is_an_image(tmp_path):
    write(tmp_path, "a/1.PNG", "a/2.jpg", "a/3.tga", "a/4.webp", "a/5", "a/6.jpg_large", "a/7.mpo")
    write(tmp_path, "a/.hidden.png", "a/.cache/1.png", ".b/1.png", "__MACOSX/a/1.png", "a/__MACOSX/1.png")
    (tmp_path / "a" / "8.heic").write_bytes(b"unreadable, but said to be an image")
    for name in ("1.txt", "1.json", "1.npy", "Thumbs.db", "features.h5", "clip.mpg", "noise"):
        (tmp_path / "a" / name).write_bytes(b"\x93NUMPY not an image at all" * 20)
    (tmp_path / "metadata.jsonl").write_text("{}")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "a" / "pipe.png")
    names = [Path(path).name for path in list_class_folders(tmp_path).paths]
    assert names == ["1.PNG", "2.jpg", "3.tga", "4.webp", "5", "6.jpg_large", "7.mpo", "8.heic"]
    assert [Path(path).name for path in list_images(tmp_path)] == names


def test_links_are_followed_and_cycles_found(tmp_path, caplog):
    store = write(tmp_path / "store", "cat/1.png", "cat/2.png", "one.png")
    root = write(tmp_path / "data", "bird/1.png")
    (root / "cat").symlink_to(store / "cat")  # a class
    (root / "bird" / "more").symlink_to(store / "cat")  # a folder below one
    (root / "bird" / "2.png").symlink_to(store / "one.png")  # an image
    assert counted(root) == {"bird": 4, "cat": 2}
    assert not caplog.records
    (root / "bird" / "again").symlink_to(root / "bird")
    (root / "cat" / "up").symlink_to(root)
    assert counted(root) == {"bird": 4, "cat": 2}
    assert "again links to" in caplog.text and "up links to" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "got nothing"),
        (["1.png", "2.png"], "images without a class: .*1.png, .*2.png"),
        (["a/1.png", "stray.png"], "images without a class: .*stray.png"),
        (["a/1.png", "stray"], "images without a class: .*stray"),
        (["a/1.png", "b/.1.png"], r"got none in .*b, which has \.1\.png"),
        (["a/1.png", "b/__MACOSX/1.png"], "got none in .*b, which has __MACOSX"),
    ],
)
def test_a_folder_that_is_no_set_of_classes_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        open_images(train_data_dir=str(write(tmp_path, *files)))


def test_classes_without_an_image_and_links_that_lead_nowhere_are_refused(tmp_path):
    root = write(tmp_path / "data", "a/1.png")
    for make, message in (
        (lambda: (root / "b").mkdir(), "got none in .*b, which has nothing"),
        (lambda: (root / "b" / "notes.txt").write_text("no image"), "got none in .*b, which has notes.txt"),
        (lambda: write(root, "b/1.png"), None),
        (lambda: (root / "c").symlink_to(tmp_path / "gone"), "Expected links that lead somewhere, got .*c to .*gone"),
    ):
        make()
        if message is None:
            assert counted(root) == {"a": 1, "b": 1}
            continue
        with pytest.raises(ValueError, match=message):
            open_images(train_data_dir=str(root))
    with pytest.raises(ValueError, match="Expected a folder that can be read, got .*nowhere"):
        open_images(train_data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Expected a folder that can be read, got .*1.png"):
        FolderImages(root / "a" / "1.png")


def test_a_layout_of_splits_is_chosen_and_never_guessed(tmp_path, caplog):
    root = write(tmp_path, "train/cat/0.png", "train/zebra/0.png", "test/0.png", "test/1.png")
    assert counted(root, split="train") == {"cat": 1, "zebra": 1} and not caplog.records
    assert counted(root) == {"test": 2, "train": 2}
    assert "The classes of" in caplog.text and "--dataset_split" in caplog.text
    with pytest.raises(ValueError, match="images without a class"):
        open_images(train_data_dir=str(root), split="test")
    with pytest.raises(ValueError, match="Expected a folder val in .*, got test, train"):
        open_images(train_data_dir=str(root), split="val")


def test_a_folder_of_classes_named_as_a_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Name it with train_data_dir"):
        open_images(str(write(tmp_path / "data", "train/1.png", "val/1.png")), cache_dir=str(tmp_path / "cache"))


def test_names_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(ValueError, match="Expected names in UTF-8"):
        list_class_folders(tmp_path)


def test_the_order_is_that_of_the_names(tmp_path):
    names = ["b/2.png", "b/10.png", "b/sub/1.png", "a/z.png", "B/1.png", unicodedata.normalize("NFD", "é") + "/1.png"]
    paths = [Path(path).relative_to(tmp_path).as_posix() for path in list_images(write(tmp_path, *names))]
    assert paths == sorted(names, key=lambda name: name.split("/"))


def test_a_stream_of_a_folder_mixes_its_classes(tmp_path):
    write(tmp_path, *[f"{name}/{i}.png" for name in "ab" for i in range(30)])
    dataset = open_training_data(train_data_dir=str(tmp_path), resolution=8, streaming=True, shuffle_buffer=4)
    first = [record["label"] for record, _ in zip(dataset.source, range(20), strict=False)]
    assert 4 < sum(first) < 16
