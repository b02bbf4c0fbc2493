# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import os

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_evaluation import pixels, write_images

from diffusers_tread.metrics import DatasetImages, FolderImages, NpzImages


def test_a_photo_on_its_side_is_upright_in_a_folder_and_in_a_data_set(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image = pixels(6, 1, height=8, width=8)[0]
    (tmp_path / "images" / "a class").mkdir(parents=True)
    PIL.Image.fromarray(image).save(tmp_path / "images" / "a class" / "photo.png", exif=exif)
    upright = torch.from_numpy(np.rot90(image, k=-1).copy()).permute(2, 0, 1)[None]
    data = DatasetImages(str(tmp_path / "images"), resolution=8, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(FolderImages(tmp_path / "images").read(0, 1), upright)
    assert torch.equal(data.read(0, 1), upright)


@pytest.mark.parametrize("kind", ["folder", "file", "data set"])
def test_other_images_under_the_same_name_have_another_description(kind, tmp_path):
    def describe():
        if kind == "folder":
            return FolderImages(tmp_path / "images").description
        if kind == "file":
            return NpzImages(tmp_path / "images.npz").description
        return DatasetImages(str(tmp_path / "images"), resolution=8, cache_dir=str(tmp_path / "cache")).description

    folder = write_images(tmp_path / "images", pixels(6, 3))
    np.savez(tmp_path / "images.npz", pixels(6, 3))
    before = describe()
    assert describe() == before
    PIL.Image.fromarray(pixels(7, 1)[0]).save(folder / "000001.png")
    os.utime(folder / "000001.png", (0, 0))  # `datasets` looks at the time, in seconds
    np.savez(tmp_path / "images.npz", pixels(7, 3))
    assert describe() != before


def test_a_data_set_without_access_or_without_the_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="access to the data set .*nowhere"):
        DatasetImages(str(tmp_path / "nowhere"), resolution=8)
    folder = write_images(tmp_path / "images", pixels(6, 3))
    with pytest.raises(ValueError, match="column 'photo'"):
        DatasetImages(str(folder), resolution=8, image_column="photo", cache_dir=str(tmp_path / "cache"))
