# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The images of convergence.py: one file of pixels for training and for judging, from folders or drawn by dicebear.

Shapes: N images, H and W their sides.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import count, islice
from pathlib import Path

import numpy as np
import PIL.Image
from common import write_whole

from diffusers_tread.data.images import center_crop


# Of dicebear, released as CC0.
STYLES = (
    "pixel-art lorelei notionists open-peeps cutouts moods clay critters sprouts planets "
    "landscape voxel-art thumbs pixelbot gaze marbles stack cameo glass blobs"
).split()
SETS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Pixels of two sets that share no image, uint8 [N, H, W, 3], with labels [N] int64 in [0, classes)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    heldout_images: np.ndarray
    heldout_labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self):
        for name in SETS:
            images, labels = getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3):
                raise ValueError(
                    f"Expected {name}_images as uint8 [N, {self.size}, {self.size}, 3], got {images.dtype} "
                    f"{list(images.shape)}. Make the file with --make_data."
                )
            if len(labels) != len(images) or sorted(set(labels.tolist())) != list(range(len(self.class_names))):
                raise ValueError(
                    f"Expected {len(images)} {name}_labels of all {len(self.class_names)} classes, got {len(labels)} "
                    f"of {len(set(labels.tolist()))}. Make the file with --make_data."
                )

    @property
    def size(self) -> int:
        """H, and W."""
        return self.train_images.shape[1]

    def save(self, path: Path) -> None:
        """Writes a compressed .npz."""
        np.savez_compressed(buffer := io.BytesIO(), **vars(self))
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Images":
        with np.load(path) as arrays:
            fields = {name: arrays[name] for name in arrays.files}
        return cls(**fields | {"class_names": tuple(fields["class_names"].tolist())})


def read_folders(train: Path, heldout: Path, *, size: int) -> Images:
    """Images of FOLDER/CLASS/*.png, cropped and resized; held-out ones that are also in training are left out.

    Raises:
        ValueError: No classes, or other classes in the two folders.
    """
    names = [sorted({path.parent.name for path in folder.glob("[!.]*/*.png")}) for folder in (train, heldout)]
    if not names[0] or names[0] != names[1]:
        raise ValueError(f"Expected the same classes as folders in {train} and {heldout}, got {names}.")
    sets = [[], []]
    for name in names[0]:
        for images, folder in zip(sets, (train, heldout), strict=True):
            paths = sorted((folder / name).glob("*.png"))
            images.append([np.asarray(shrink(PIL.Image.open(path), size)) for path in paths])
        sets[1][-1] = list(unseen(sets[1][-1], sets[0][-1]))
    return stack(*sets, class_names=names[0])


def read_digits(*, num_heldout: int = 600) -> Images:
    """scikit-learn's handwritten digits in grey, 8 x 8 pixels, held-out ones by a fixed draw; needs scikit-learn."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)  # N 8 8 3
    train, heldout, train_labels, heldout_labels = train_test_split(
        pixels, digits.target, test_size=num_heldout, stratify=digits.target, random_state=0
    )
    return Images(
        train_images=train,
        train_labels=train_labels,
        heldout_images=heldout,
        heldout_labels=heldout_labels,
        class_names=tuple(map(str, digits.target_names)),
    )


def draw_avatars(*, num_train: int, num_heldout: int, size: int) -> Images:
    """As many avatars of each of `STYLES`, the same ones in every call; needs dicebear-core, -styles and resvg-py."""
    import resvg_py
    from dicebear import Avatar, Style

    def draw(style: Style, seed: str) -> np.ndarray:
        svg = Avatar(style, {"seed": seed, "size": 2 * size}).to_string()
        return np.asarray(shrink(PIL.Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))), size))

    train, heldout = [], []
    for name in STYLES:
        style = Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))
        train.append([draw(style, f"train-{index}") for index in range(num_train // len(STYLES))])
        others = unseen((draw(style, f"heldout-{index}") for index in count()), train[-1])
        heldout.append(list(islice(others, num_heldout // len(STYLES))))
    return stack(train, heldout, class_names=STYLES)


def shrink(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """An RGB image of this size, on white where it is transparent."""
    image = image.convert("RGBA")
    return center_crop(PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image), size).convert(
        "RGB"
    )


def unseen(images: Iterable[np.ndarray], train: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Those that are not, pixel for pixel, in training: a style may have few pictures."""
    seen = {image.tobytes() for image in train}
    return (image for image in images if image.tobytes() not in seen)


def stack(train: list[list[np.ndarray]], heldout: list[list[np.ndarray]], *, class_names: list[str]) -> Images:
    """Images listed by class as two sets."""
    fields = {}
    for kind, images in zip(SETS, (train, heldout), strict=True):
        fields[f"{kind}_images"] = np.stack([image for one in images for image in one])
        fields[f"{kind}_labels"] = np.repeat(np.arange(len(images)), [len(one) for one in images])
    return Images(**fields, class_names=tuple(class_names))
