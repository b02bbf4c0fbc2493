# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Pictures that a run leaves."""

import io
from pathlib import Path

import PIL.Image
from diffusers.utils import make_image_grid

from ..files import publish


def make_grid(images: list[PIL.Image.Image], *, columns: int = 10) -> PIL.Image.Image:
    """Images of one size side by side; those of at most 32 pixels a side are enlarged by repeating pixels.

    Args:
        images: At least one.
        columns: Images in a row, where there are that many.
    """
    columns = min(columns, len(images))
    zoom = max(1, 64 // images[0].width)
    images = [image.resize((image.width * zoom,) * 2, PIL.Image.Resampling.NEAREST) for image in images]
    images += [PIL.Image.new(images[0].mode, images[0].size)] * (-len(images) % columns)
    return make_image_grid(images, rows=len(images) // columns, cols=columns)


def save_image(image: PIL.Image.Image, path: Path) -> None:
    """Writes a PNG that is there whole or not at all, and the folder it goes into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG")
    publish(temporary, path)


def save_curve(points: list[tuple[float, float]], path: Path, *, x_label: str, y_label: str) -> None:
    """Writes a PNG of points joined by lines; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.grid(alpha=0.3)
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=120)
    save_image(PIL.Image.open(pixels), path)
