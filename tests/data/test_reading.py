# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Image files as pixels: modes, transparency, orientation, sizes, and everything that Pillow raises."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from fuzz_images import FORMATS, fuzz

from diffusers_tread.data import UnreadableImage, load_image, make_batches, open_training_data
from diffusers_tread.data.images import read_image
from diffusers_tread.metrics import DatasetImages, FolderImages


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def grey(value, dtype) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((16, 16), value, dtype))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(grey(32768, np.uint16), "PNG"), 128),
        (encoded(grey(65535, np.uint16), "PNG"), 255),
        (encoded(grey(300, np.uint16), "PNG"), 1),
        (encoded(grey(32768, np.uint16), "TIFF"), 128),
        (encoded(grey(32768, np.dtype(">u2")), "TIFF"), 128),
        (b"P5 16 16 65535\n" + b"\x80\x00" * 256, 128),  # PGM
        (encoded(grey(0.5, np.float32), "TIFF"), 128),
        (encoded(grey(1.0, np.float32), "TIFF"), 255),
        (encoded(grey(100, np.uint8), "PNG"), 100),
        (encoded(PIL.Image.new("1", (16, 16), 1), "PNG"), 255),
        (encoded(PIL.Image.new("CMYK", (16, 16), (0, 0, 0, 127)), "JPEG"), 128),
    ],
)
def test_grey_keeps_its_brightness(data, expected):
    assert abs(np.asarray(load_image(data, name="x"), dtype=np.float64) - expected).max() <= 1


@pytest.mark.parametrize(
    "image",
    [
        grey(70_000, np.int32),
        grey(100, np.int32),
        grey(200.0, np.float32),
        grey(-0.1, np.float32),
        grey(np.nan, np.float32),
    ],
)
def test_grey_of_an_unknown_range_is_unreadable(image):
    with pytest.raises(UnreadableImage, match=r"^x \(ValueError: expected grey of 16 bits or in \[0, 1\]"):
        load_image(encoded(image, "TIFF"), name="x")


def transparent(mode: str) -> bytes:
    """An image whose left half is transparent, over red, and whose right half is black."""
    image = PIL.Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 8, 16))
    if mode == "P":
        image = PIL.Image.new("P", (16, 16), 1)
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 8, 16))
        return encoded(image, "PNG", transparency=0)
    if mode in ("RGB", "L"):
        return encoded(image.convert(mode), "PNG", transparency=(255, 0, 0) if mode == "RGB" else 76)
    if mode == "I;16":
        return encoded(
            PIL.Image.fromarray(np.repeat([[9, 0]], 8, 1).repeat(16, 0).astype(np.uint16)), "PNG", transparency=9
        )
    return encoded(image.convert(mode), "TIFF" if mode in ("La", "RGBa") else "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
@pytest.mark.parametrize(("background", "color"), [("white", (255, 255, 255)), ("#0080ff", (0, 128, 255))])
def test_transparent_parts_show_the_background(mode, background, color):
    pixels = np.asarray(load_image(transparent(mode), name="x", background=background))
    assert (pixels[:, :8] == color).all() and (pixels[:, 8:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resolution_is_text", [False, True])
def test_images_are_turned_upright_as_pillow_turns_them(orientation, resolution_is_text):
    image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 6, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    right = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    if resolution_is_text:  # which Pillow cannot write anew
        entries = struct.pack("<HHHII", 2, 0x0112, 3, 1, orientation) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0")
        data = encoded(image, "PNG", exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4))
    assert np.array_equal(load_image(data, name="x"), right)


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "missing"),
        (b"", "UnidentifiedImageError"),
        (b"no image", "UnidentifiedImageError"),
        (png_of(20_000, 20_000), "DecompressionBombError"),
        (png_of(2**31 - 1, 2**31 - 1), "DecompressionBombError"),
        (png_of(64, 64), "OSError"),
        (encoded(PIL.Image.new("RGB", (64, 64)), "JPEG")[:-200], "OSError"),
        (encoded(PIL.Image.new("RGB", (32, 32)), "DDS")[:80] + bytes(4) + bytes(200), "NotImplementedError|OSError"),
        ("nowhere.png", "FileNotFoundError"),
    ],
)
def test_an_unreadable_image_is_named_with_the_reason(data, reason):
    with pytest.raises(UnreadableImage, match=rf"^folder/x.png \(({reason})"):
        load_image(data, name="folder/x.png")
    value = None if data is None else {"bytes": data if isinstance(data, bytes) else None, "path": "nowhere.png"}
    assert read_image(value, resolution=8) is None


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 5000), (20_001, 2)])
def test_a_long_image_is_cropped_before_it_is_resized(size, monkeypatch):
    resize, largest = PIL.Image.Image.resize, []
    monkeypatch.setattr(
        PIL.Image.Image, "resize", lambda self, size, *args: largest.append(size) or resize(self, size, *args)
    )
    image = PIL.Image.new("L", size)
    image.paste(
        255, tuple((side - 1) // 2 if side > 9 else 0 for side in size) + tuple(side // 2 + 1 for side in size)
    )
    pixels = np.asarray(load_image(encoded(image, "PNG"), name="x", resolution=64), dtype=np.float64).mean(axis=2)
    assert pixels.shape == (64, 64) and max(max(size) for size in largest) <= 8 * 64
    middle = np.average(np.indices((64, 64)).sum(0), weights=pixels) / 2
    assert abs(middle - 31.5) < 40 / min(size)  # the bright pixel of the middle is in the middle


def test_unreadable_images_are_named_by_path_and_end_an_evaluation(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("a/good.png", "a/bad.png", "b/good.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "a" / "bad.png").write_bytes(png_of(20_000, 20_000))
    for streaming in (False, True):
        dataset = open_training_data(train_data_dir=str(tmp_path), resolution=8, streaming=streaming)
        batches = make_batches(dataset, batch_size=3, seed=0)
        corrupt = {name for _ in range(3) for name in next(batches)["corrupt"]}
        assert len(corrupt) == 1 and corrupt.pop().startswith(f"{tmp_path / 'a' / 'bad.png'} (DecompressionBombError")
    with pytest.raises(ValueError, match=r"got .*a/bad.png \(DecompressionBombError"):
        FolderImages(tmp_path).read(0, 3)

    images = [
        {"bytes": encoded(PIL.Image.new("LA", (8, 8), (0, 0)), "PNG"), "path": None},
        {"bytes": b"", "path": None},
    ]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    source = DatasetImages(str(tmp_path / "set"), resolution=8, background="blue", cache_dir=str(tmp_path / "cache"))
    assert torch.equal(source.read(0, 1)[0, :, 0, 0], torch.tensor([0, 0, 255], dtype=torch.uint8))
    with pytest.raises(ValueError, match="got image 1 of .*set .*Unidentified"):
        source.read(0, 2)


def test_a_background_that_is_no_colour_is_refused_before_any_image_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match="unknown color"):
        open_training_data(train_data_dir=str(tmp_path), resolution=8, background="whitish")


def test_no_mutated_image_raises_anything_else():
    outcomes = fuzz(200, seed=0)
    assert set(outcomes) <= {"read", "unreadable"} and min(outcomes.values()) > 20
    assert len(FORMATS) >= 20
