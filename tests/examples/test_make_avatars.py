# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The example that draws avatars: bytes, resuming, captions, and what `datasets` makes of the folder."""

import json
import multiprocessing
import re
import time

import numpy as np
import PIL.Image
import pytest
from runs import files_of


for package in ("dicebear", "dicebear_styles", "resvg_py"):
    pytest.importorskip(package)

import make_avatars  # noqa: E402

from diffusers_tread.data.loading import open_training_data  # noqa: E402
from diffusers_tread.demos import avatar_captions  # noqa: E402


FEW = "gaze,moods,stack"  # are opened and drawn fast


def run(folder, *flags, num_images=10, styles=FEW, num_workers=1):
    words = ["--output_dir", folder, "--num_images", num_images, "--styles", styles, "--num_workers", num_workers]
    make_avatars.main([str(word) for word in [*words, *flags]])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images of three classes, 32 x 32."""
    folder = tmp_path_factory.mktemp("avatars") / "heldout"
    run(folder, "--resolution", 32, "--split", "heldout")
    return folder


def test_the_folder_holds_balanced_classes_and_nothing_else(folder):
    names = [f"{style}/{style}-{index:07d}.png" for index in range(4) for style in FEW.split(",")][:10]
    assert [row["file_name"] for row in rows_of(folder)] == names
    assert set(files_of(folder)) == {*names, "metadata.jsonl", "README.md", "settings.json"}
    assert [row["label"] for row in rows_of(folder)] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_images_are_opaque_and_small_ones_are_means_of_larger_ones(folder):
    for row in rows_of(folder):
        image = PIL.Image.open(folder / row["file_name"])
        assert (image.mode, image.size, image.info) == ("RGB", (32, 32), {})
        large, _ = make_avatars.draw(row["class_name"], seed=row["seed"], resolution=64)
        means = np.asarray(large, dtype=float).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(np.asarray(image) - means).max() <= 0.5


def test_any_number_of_workers_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(make_avatars, "CHUNK", 3)
    run(tmp_path / "two", "--resolution", 32, "--split", "heldout", num_workers=2)
    assert files_of(tmp_path / "two") == files_of(folder)


def test_a_finished_run_does_nothing(folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(make_avatars, "draw_missing", None)
    run(folder, "--resolution", 32, "--split", "heldout")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_killed_run_goes_on_and_leaves_no_worker(tmp_path):
    flags = ["--styles", "gaze", "--num_images", "500", "--num_workers", "2", "--output_dir"]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=make_avatars.main, args=([*flags, str(tmp_path / "killed")],))
    process.start()
    while not list(tmp_path.glob("killed/.parts/*.jsonl")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()

    time.sleep(1)  # for the workers, who see that they are alone
    left = files_of(tmp_path / "killed")
    time.sleep(0.5)
    assert files_of(tmp_path / "killed") == left
    assert 100 < len(left) < 500 and "metadata.jsonl" not in left
    make_avatars.main([*flags, str(tmp_path / "killed")])
    make_avatars.main([*flags, str(tmp_path / "whole")])
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert len(rows_of(tmp_path / "whole")) == 500


def test_a_folder_of_other_settings_is_refused(folder):
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"got others: \['num_images', 'seed'\] differ"):
        run(folder, "--resolution", 32, "--split", "heldout", "--seed", 1, num_images=11)
    assert files_of(folder) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"empty or a new --output_dir, got .* with \['thesis.txt'\]"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_splits_and_seeds_have_avatars_of_their_own(folder, tmp_path):
    run(tmp_path / "train", "--resolution", 32)
    run(tmp_path / "seed", "--resolution", 32, "--split", "heldout", "--seed", 1)
    folders = folder, tmp_path / "train", tmp_path / "seed"
    assert len({row["seed"] for one in folders for row in rows_of(one)}) == 30
    assert len({data for one in folders for name, data in files_of(one).items() if name.endswith(".png")}) == 30


def test_more_images_begin_with_the_fewer_ones(folder, tmp_path):
    run(tmp_path / "more", "--resolution", 32, "--split", "heldout", num_images=13)
    assert rows_of(tmp_path / "more")[:10] == rows_of(folder)


def test_datasets_reads_images_labels_and_captions(folder, tmp_path):
    import datasets

    plain = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path))
    named = datasets.load_dataset(str(folder), split="heldout", cache_dir=str(tmp_path))
    assert named.features["label"].names == FEW.split(",")
    for dataset in (plain, named):
        for record, row in zip(dataset, rows_of(folder), strict=True):
            np.testing.assert_array_equal(record.pop("image"), PIL.Image.open(folder / row.pop("file_name")))
            assert record == row


def test_the_package_trains_on_it(folder, tmp_path):
    data = open_training_data(train_data_dir=str(folder), resolution=32, cache_dir=str(tmp_path))
    assert (len(data), data.num_classes, data[0, 4]["class_labels"]) == (10, 3, 1)
    assert data[0, 4]["pixel_values"].shape == (3, 32, 32)
    data = open_training_data(str(folder), split="heldout", resolution=32, cache_dir=str(tmp_path))
    assert list(data.id2label.values()) == FEW.split(",")


def test_the_card_names_styles_licences_and_authors(tmp_path):
    run(tmp_path / "two", styles="lorelei,gaze", num_images=2)
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc0-1.0\n") and f"[CC0 1.0]({make_avatars.CC0})" in card
    assert "[Lisa Wischofsky](https://www.instagram.com/lischi_art/)" in card
    assert "--num_images 2 --resolution 64 --split train --seed 0 --styles gaze,lorelei" in card


def test_a_sheet_shows_the_first_images_of_each_class(folder, tmp_path):
    run(folder, "--resolution", 32, "--split", "heldout", "--sheet", tmp_path / "sheet.png")
    sheet = np.asarray(PIL.Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 2 * 66  # enlarged to 64 pixels, and framed
    for top, style in ((1, "gaze"), (67, "moods"), (1, "stack")):
        image = np.asarray(PIL.Image.open(folder / style / f"{style}-0000000.png")).repeat(2, 0).repeat(2, 1)
        strip = sheet[top : top + 64]
        assert sum(np.array_equal(strip[:, x : x + 64], image) for x in range(sheet.shape[1] - 63)) == 1


def test_all_styles_are_in_the_public_domain_and_others_are_refused():
    assert len(avatar_captions.STYLES) == 20
    for style in avatar_captions.STYLES:
        assert make_avatars.read_style(style)["meta"]["license"]["name"] == "CC0 1.0"
    with pytest.raises(ValueError, match="CC0 1.0, got CC BY 4.0 for adventurer"):
        make_avatars.read_style("adventurer")


@pytest.mark.parametrize(
    ("style", "chosen", "expected"),
    [
        ("pixel-art",
         {"skinColor": "#ffdbac", "hair": "long06", "hairColor": "#603a14", "mouth": "sad10", "beard": "variant01"},
         ("a pixel-art portrait", ["light skin", "long brown hair", "a sad mouth"])),
        ("critters",
         {"body": "tilt", "bodyColor": "#fdba74", "top": "earsDroop", "accentColor": "#a5b4fc", "eyes": "trio"},
         ("a tilted light orange monster", ["lavender droopy ears on its head", "three eyes"])),
        ("critters",
         {"body": "egg", "bodyColor": "#7dd3fc", "top": "antenna", "accentColor": "#e07b39", "mouth": "bigSmile"},
         ("an egg-shaped light blue monster", ["an orange antenna on its head", "a big smile"])),
        ("voxel-art",
         {"top": "cap", "hatColor": "#4a6fa5", "hairColor": "#5a3825", "glasses": "shades", "eyes": "star"},
         ("a voxel figure", ["a slate blue cap", "sunglasses"])),  # the eyes are behind them
        ("open-peeps", {"head": "bantuKnots"}, ("a hand-drawn bust", ["black Bantu knots"])),
        ("blobs", {"body": "quartet", "blobColor": "#000000"}, ("four translucent black blobs", [])),
    ],
)  # fmt: skip
def test_a_description_tells_the_options_in_english(style, chosen, expected):
    subject, details, where = avatar_captions.describe(style, chosen | {"backgroundColor": "#ffffff"})
    assert (subject.removesuffix(" on top of each other"), details) == expected
    assert where == "on a white background"


@pytest.mark.parametrize("style", sorted(avatar_captions.STYLES))
def test_captions_are_sentences_that_fit_the_seed(style):
    for index in range(20):
        _, chosen = make_avatars.draw(style, seed=f"test-{index}", resolution=16)
        captions = [avatar_captions.write_captions(style, chosen, pick=pick) for pick in range(4)]
        sentences = [one["caption"] for one in captions]
        assert len(set(sentences)) == 4 and captions[0] == avatar_captions.write_captions(style, chosen, pick=0)
        subject, details, where = avatar_captions.describe(style, chosen)
        for sentence in sentences:
            assert re.fullmatch(r"[A-Z][A-Za-z',;: -]+\.", sentence) and "  " not in sentence
            assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeioAEIO]|variant|\b(\w+) \1\b(?! and)", sentence), sentence
            assert all(phrase in sentence[0].lower() + sentence[1:] for phrase in (subject, *details, where))


def test_colours_have_the_names_of_their_hues():
    names = {"#ff0000": "red", "#000000": "black", "#ffffff": "white", "#808080": "gray", "#3b7de0": "blue"}
    names |= {"#ffcdd6": "light pink", "#5a3418": "brown", "#00000057": "dark", "#ffffff8f": "light"}
    assert {color: avatar_captions.name_color(color) for color in names} == names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_images 0", "--num_images >= 1, got 0"),
        ("--resolution 0", "--resolution >= 1"),
        ("--num_workers 0", "--num_workers >= 1"),
        ("--seed -1", "--seed >= 0"),
        ("--split held-out", "letters, digits and underscores, got 'held-out'"),
        ("--styles gaze,monalisa", r"--styles among .*, got \['monalisa'\]"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        make_avatars.main(["--output_dir", str(tmp_path / "avatars"), *flags.split()])
    assert not (tmp_path / "avatars").exists()


def test_ctrl_c_keeps_what_was_drawn_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_avatars, "draw_missing", stop)
    with pytest.raises(SystemExit) as ended:
        make_avatars.main(["--output_dir", str(tmp_path / "avatars"), "--num_images", "40"])
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "To go on: python" in said and f"--output_dir {tmp_path / 'avatars'} --num_images 40" in said
