# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Decodes image files to pixels, by one rule for training, latents and metrics."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch


# How to turn an image upright for each value of EXIF's orientation. Pillow's `exif_transpose` is not used because it
# rewrites the EXIF data and so fails if any entry is damaged, even one that is not needed.
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
    file: str | Path | bytes | None,
    *,
    name: str,
    resolution: int | tuple[int, int] | None = None,
    background: str = "white",
) -> PIL.Image.Image:
    """Loads an image file as 8-bit RGB, upright, with its transparent parts on a background.

    16-bit grey is scaled to 8 bits, and float grey from [0, 1], so that white stays white.

    Args:
        file: Path or content; None for a missing image.
        name: Name of the image for error messages.
        resolution: Size to which `center_crop` crops and resizes, R or (height, width); None keeps the size.
        background: A colour known to Pillow, such as "white" or "#808080".

    Raises:
        ValueError: Pillow does not know the colour.
        UnreadableImage: The image is missing, damaged, larger than twice `PIL.Image.MAX_IMAGE_PIXELS`, or grey with an
            unknown range: 32-bit integers, or floats outside [0, 1].
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
    """Converts a decoded image to 8-bit RGB."""
    # 16-bit and float grey.
    is_grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if is_grey16 or image.mode in ("I", "F"):
        grey, transparent = np.array(image), image.info.get("transparency")
        white = 65535 if is_grey16 else 1
        if image.mode == "I" and not is_grey16 or not (grey.min() >= 0 and grey.max() <= white):  # also refuses NaN
            raise ValueError(f"expected grey of 16 bits or in [0, 1], got mode {image.mode} with {grey.max():g}")
        # In float64, in which halves are exact: 255 / 65535 = 1 / 257.
        pixels = np.rint(grey.astype(np.float64) * 255 / white).astype(np.uint8)
        image = PIL.Image.fromarray(pixels).convert("RGB")
        if isinstance(transparent, int):
            image.putalpha(PIL.Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))

    # Transparency.
    if image.has_transparency_data:
        canvas = PIL.Image.new("RGBA", image.size, background)
        image = PIL.Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image: PIL.Image.Image, resolution: int | tuple[int, int]) -> PIL.Image.Image:
    """Crops and resizes an image to `resolution`, R or (height, width), as ADM prepares ImageNet (arXiv 2105.05233).

    The image is halved with a box filter while both sides are at least twice as long as in the result, then resized
    with a bicubic filter until the tighter side fits, then cropped. If an image is more than eight times as elongated
    as the crop, only its middle is resized, to save memory.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution

    # Only the middle of very long images.
    longest = (max(8 * image.height * width // height, 1), max(8 * image.width * height // width, 1))
    kept_width, kept_height = map(min, image.size, longest)
    if (kept_width, kept_height) != image.size:
        left, top = (image.width - kept_width) // 2, (image.height - kept_height) // 2
        image = image.crop((left, top, left + kept_width, top + kept_height))

    # Halve, resize, crop.
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Converts an 8-bit RGB image to a tensor [3, H, W], float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # H W 3
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def load_record(
    value: dict[str, Any] | None,
    *,
    name: str,
    resolution: int | tuple[int, int],
    flip: bool = False,
    background: str = "white",
) -> torch.Tensor:
    """Decodes the image of a `datasets` record to a tensor [3, H, W], float32 in [-1, 1].

    Args:
        value: {"bytes": ..., "path": ...}, or None for a missing image.
        name: Name for error messages if the image has no path.
        resolution: R for R x R, or (H, W); see `center_crop`.
        flip: Whether to mirror the image.
        background: See `load_image`.

    Raises:
        UnreadableImage: See `load_image`.
        OSError: The connection to a remote image was lost.
    """
    file, path = fetch(value)
    image = load_image(file, name=path or name, resolution=resolution, background=background)
    if flip:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image_to_tensor(image)


def image_size(value: dict[str, Any] | None, *, name: str) -> tuple[int, int]:
    """Reads the (height, width) of an undecoded image, after it is turned upright, from the header of its file.

    Args:
        value: As for `load_record`.
        name: Name for error messages if the image has no path.

    Raises:
        UnreadableImage: The image is missing, or its header cannot be read.
        OSError: The connection to a remote image was lost.
    """
    file, path = fetch(value)
    if file is None:
        raise UnreadableImage(f"{path or name} (missing)")
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            # `getexif` of PNG files would decode the image first, to find EXIF data behind it.
            orientation = PIL.Image.Image.getexif(image).get(EXIF_ORIENTATION)
            width, height = image.size
            return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise UnreadableImage(f"{path or name} ({type(error).__name__}: {error})") from error


def fetch(value: dict[str, Any] | None) -> tuple[bytes | str | None, str | None]:
    """Fetches an undecoded image; remote files are read.

    Returns:
        Its content or local path, and its path; None for what is missing.

    Raises:
        OSError: The connection was lost.
    """
    path, file = (value or {}).get("path"), (value or {}).get("bytes")
    if file is None and path is not None:
        file = _read_remote(path) if "://" in path else path
    return file, path


def _read_remote(url: str) -> bytes | None:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def read_image(
    value: dict[str, Any] | None, *, resolution: int | tuple[int, int], **options: Any
) -> torch.Tensor | None:
    """The same as `load_record`, but returns None for an unreadable image."""
    try:
        return load_record(value, name="image", resolution=resolution, **options)
    except UnreadableImage:
        return None
