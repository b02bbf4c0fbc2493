# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reads images with random damage, of which none may raise: `python tests/fuzz_images.py 20000`."""

import io
import sys
from collections import Counter

import numpy as np
import PIL.Image
from tqdm import tqdm

from diffusers_tread.data.images import read_image


# Format, mode, options.
FORMATS = [
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "I;16", {}),
    ("JPEG", "RGB", {}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("WEBP", "RGBA", {}),
    ("AVIF", "RGB", {}),
    ("GIF", "P", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "F", {}),
    ("BMP", "RGB", {}),
    ("DDS", "RGBA", {}),
    ("DIB", "RGB", {}),
    ("ICNS", "RGBA", {}),
    ("ICO", "RGBA", {}),
    ("IM", "RGB", {}),
    ("JPEG2000", "RGB", {}),
    ("MPO", "RGB", {}),
    ("MSP", "1", {}),
    ("PCX", "RGB", {}),
    ("PPM", "RGB", {}),
    ("SGI", "RGB", {}),
    ("SPIDER", "F", {}),
    ("TGA", "RGBA", {}),
    ("XBM", "1", {}),
    ("BLP", "P", {}),
    ("QOI", "RGB", {}),
]


def make_images() -> list[bytes]:
    """One small image of each format that this Pillow can write."""
    noise = np.random.RandomState(0).randint(0, 256, (24, 20, 4), dtype=np.uint8)
    images = []
    for name, mode, options in FORMATS:
        grey = PIL.Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        image = grey if mode == "I;16" else PIL.Image.fromarray(noise).convert("RGB").convert(mode)
        data = io.BytesIO()
        try:
            image.save(data, name, **options)
        except (KeyError, OSError):
            continue
        images.append(data.getvalue())
    return images


def mutate(data: bytes, random: np.random.RandomState) -> bytes:
    """Changes, cuts, repeats or fills bytes, mostly in the header."""
    data = bytearray(data)
    for _ in range(random.randint(1, 5)):
        at = random.randint(len(data)) if random.rand() < 0.5 else random.randint(min(len(data), 100))
        kind, length = random.randint(5), random.randint(1, 9)
        if kind == 0:
            data[at] = random.randint(256)
        elif kind == 1:
            data[at : at + length] = random.bytes(length)
        elif kind == 2:
            data[at : at + length] = bytes([random.choice([0, 255])]) * length
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif len(data) > 20:
            del data[-random.randint(1, len(data) - 10) :]
    return bytes(data)


def fuzz(count: int, *, seed: int, progress: bool = False) -> Counter:
    """How many images were "read", "unreadable", or raised an error, by its name."""
    random, images, outcomes = np.random.RandomState(seed), make_images(), Counter()
    for index in tqdm(range(count), disable=not progress):
        data = mutate(images[index % len(images)], random)
        try:
            pixels = read_image({"bytes": data, "path": None}, resolution=16)
        except Exception as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["unreadable" if pixels is None else "read"] += 1
    return outcomes


if __name__ == "__main__":
    print(dict(fuzz(int(sys.argv[1]), seed=0, progress=True)))
