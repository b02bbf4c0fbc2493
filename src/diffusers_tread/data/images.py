# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Image files as pixels: one rule for training, latents and metrics."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch


# What to do with an image for each value of EXIF's orientation. Not `exif_transpose`: it writes the EXIF data anew and
# fails where an entry that nobody needs is damaged.
UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x0112


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it and says why."""


def load_image(
    file: str | Path | bytes | None, *, name: str, resolution: int | None = None, background: str = "white"
) -> PIL.Image.Image:
    """An image file as 8-bit RGB, upright, with its transparent parts on a background.

    16-bit grey is scaled to 8 bits and float grey from [0, 1], so that white stays white.

    Args:
        file: Path or content; None for an image that is missing.
        name: What the message calls it.
        resolution: R, to which `center_crop` crops and resizes; None for the size that it has.
        background: Colour that Pillow knows, such as "white" or "#808080".

    Raises:
        ValueError: Pillow knows no such colour.
        UnreadableImage: It is missing, damaged, larger than twice `PIL.Image.MAX_IMAGE_PIXELS`, or grey of an unknown
            range: 32-bit integers, floats outside [0, 1].
    """
    behind = PIL.ImageColor.getrgb(background)[:3]
    if file is None:
        raise UnreadableImage(f"{name} (missing)")
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION)
            image.load()
            image = _to_rgb(image, behind)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        return image if resolution is None else center_crop(image, resolution)
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise UnreadableImage(f"{name} ({type(error).__name__}: {error})") from error


def _to_rgb(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """A decoded image as 8-bit RGB."""
    is_grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if is_grey16 or image.mode in ("I", "F"):
        grey, transparent = np.array(image), image.info.get("transparency")
        white = 65535 if is_grey16 else 1
        if image.mode == "I" and not is_grey16 or not (grey.min() >= 0 and grey.max() <= white):  # also refuses NaN
            raise ValueError(f"expected grey of 16 bits or in [0, 1], got mode {image.mode} with {grey.max():g}")
        # In float64, which halves exactly: 255 / 65535 = 1 / 257.
        pixels = np.rint(grey.astype(np.float64) * 255 / white).astype(np.uint8)
        image = PIL.Image.fromarray(pixels).convert("RGB")
        if isinstance(transparent, int):
            image.putalpha(PIL.Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        canvas = PIL.Image.new("RGBA", image.size, background)
        image = PIL.Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image: PIL.Image.Image, resolution: int) -> PIL.Image.Image:
    """The middle square of an image at `resolution`, as ADM prepares ImageNet (arXiv 2105.05233).

    The image is halved with a box filter while its short side is at least twice the resolution, then resized with a
    bicubic filter until the short side fits, then cropped. Of an image that is more than eight times as long as wide
    the middle alone is resized, so that it takes no memory that its square does not need.
    """
    width, height = (min(side, 8 * min(image.size)) for side in image.size)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """An 8-bit RGB image as [3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # H W 3
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def load_record(
    value: dict[str, Any] | None, *, name: str, resolution: int, flip: bool = False, background: str = "white"
) -> torch.Tensor:
    """An undecoded image of a `datasets` record as [3, R, R] float32 in [-1, 1].

    Args:
        value: {"bytes": ..., "path": ...}, or None for an image that is missing.
        name: What messages call it if it has no path.
        resolution: R; see `center_crop`.
        flip: Whether to mirror it.
        background: See `load_image`.

    Raises:
        UnreadableImage: See `load_image`.
        OSError: The connection to a remote image was lost.
    """
    path, file = (value or {}).get("path"), (value or {}).get("bytes")
    if file is None and path is not None:
        file = _read_remote(path) if "://" in path else path
    image = load_image(file, name=path or name, resolution=resolution, background=background)
    if flip:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image_to_tensor(image)


def _read_remote(url: str) -> bytes | None:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def read_image(value: dict[str, Any] | None, *, resolution: int, **options: Any) -> torch.Tensor | None:
    """What `load_record` gives; None for an image that is unreadable."""
    try:
        return load_record(value, name="image", resolution=resolution, **options)
    except UnreadableImage:
        return None
