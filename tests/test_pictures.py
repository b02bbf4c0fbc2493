# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import PIL.Image
import pytest

from diffusers_tread.pictures import add_labels, caption_grid, make_grid, name_classes, save_curve, save_image


def test_a_grid_keeps_the_order_enlarges_small_images_and_fills_the_last_row():
    images = [PIL.Image.new("L", (8, 4), 20 * index + 20) for index in range(12)]
    grid = make_grid(images)
    cells = np.asarray(grid.convert("L")).reshape(2, 34, 10, 66).swapaxes(1, 2).reshape(20, 34, 66)
    pictures = cells[:, 1:-1, 1:-1].reshape(20, -1)
    assert (pictures == pictures[:, :1]).all()
    assert pictures[:, 0].tolist() == [*range(20, 260, 20), *[0] * 8]
    cells = cells.copy()
    cells[:, 1:-1, 1:-1] = 128
    assert (cells == 128).all()


def test_classes_without_a_name_have_their_number():
    names = {"columns": ["ant", "1"] * 2}
    assert name_classes([0, 1, 0, 1], num_classes=2, id2label={"0": "ant"}) == (4, names)
    assert name_classes([11, 0, 1], num_classes=12) == (3, {"columns": ["11", "0", "1"]})


@pytest.mark.parametrize(("labels", "num_classes"), [([0, 0, 1], 2), ([0] * 3, 0)])
def test_random_or_no_classes_have_no_names(labels, num_classes):
    assert name_classes(labels, num_classes=num_classes, id2label={"0": "ant"}) == (3, {})


def test_long_names_are_cut_to_their_columns():
    grid = PIL.Image.new("L", (100, 20), "white")
    cut = np.asarray(add_labels(grid, columns=["W" * 40, ""]).convert("L"))
    assert (cut[:22, :50] < 128).any() and (cut[:, 51:] == 255).all()


def test_captions_stand_below_their_images_in_at_most_four_lines():
    images = [PIL.Image.new("RGB", (8, 4), color) for color in ("red", "lime", "blue")]
    grid = np.asarray(caption_grid(images, ["", "word " * 200, "W" * 200], columns=2))
    height = grid.shape[0] // 2
    assert grid.shape == (2 * (82 + 4 + 4 * 18), 2 * 162, 3)
    for (row, column), color in {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255)}.items():
        cell = grid[row * height :, column * 162 :][1:81, 1:161]
        assert (cell == color).all()
    below = grid.reshape(2, height, 2, 162, 3)[:, 82:].min(axis=-1)  # row, line, column, pixel
    assert (below[0, :, 0] == 255).all() and (below[1, :, 1] == 255).all()  # no caption, no image
    assert (below[0, 3 * 18 : 4 * 18, 1] < 128).any()  # the fourth line
    assert (below[1, 18:, 0] == 255).all() and (below[1, :18, 0] < 128).any()  # a word of its own is cut
    assert (below[..., -1] == 255).all()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "picture.png"
    save_image(PIL.Image.new("L", (2, 2), 9), path)
    with pytest.raises(OSError, match="cannot write mode F as PNG"):
        save_image(PIL.Image.new("F", (2, 2)), path)
    assert PIL.Image.open(path).getpixel((0, 0)) == 9 and list(path.parent.iterdir()) == [path]


def test_a_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    save_curve([(5, 30.0), (10, 20.0)], tmp_path / "curve.png", x_label="steps", y_label="FID")
    pixels = np.asarray(PIL.Image.open(tmp_path / "curve.png").convert("L"))
    assert pixels.shape == (480, 720) and pixels.std() > 0
