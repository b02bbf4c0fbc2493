# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import PIL.Image
import pytest

from diffusers_tread.pictures import make_grid, save_curve, save_image


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
