# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Image grids and curves that a run saves."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
from diffusers.utils import make_image_grid

from .files import whole


FRAME = 1  # pixels around each image of a grid


def make_grid(images: list[PIL.Image.Image], *, columns: int = 10) -> PIL.Image.Image:
    """Images of one size side by side, each in a grey frame; small ones are enlarged by repeating pixels.

    Args:
        images: At least one.
        columns: Images in a row, at most.
    """
    columns = min(columns, len(images))
    width, height = images[0].size
    zoom = max(1, 64 // width)
    images = [image.resize((width * zoom, height * zoom), PIL.Image.Resampling.NEAREST) for image in images]
    images += [PIL.Image.new(images[0].mode, images[0].size)] * (-len(images) % columns)
    framed = [PIL.ImageOps.expand(image, border=FRAME, fill="gray") for image in images]
    return make_image_grid(framed, rows=len(framed) // columns, cols=columns)


def add_labels(
    grid: PIL.Image.Image, *, title: str = "", rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> PIL.Image.Image:
    """The grid with a title and labels for its rows and columns.

    Args:
        grid: A grid with cells of one size.
        title: Text above everything.
        rows: Text to the left of each row, from the top.
        columns: Text above each column, from the left; cut if wider than the column.
    """
    # A white margin around the grid.
    font, line = PIL.ImageFont.load_default(14), 22
    left = max([8 + round(font.getlength(text)) for text in rows], default=0)
    top = line * (bool(title) + bool(columns))
    picture = PIL.Image.new("RGB", (left + grid.width, top + grid.height), "white")
    picture.paste(grid, (left, top))

    # The texts.
    write = partial(PIL.ImageDraw.Draw(picture).text, fill="black", font=font)
    write((left + 4, line / 2), title, anchor="lm")
    for column, text in enumerate(columns):
        text = _cut(text, font, grid.width // len(columns))
        write((left + (column + 0.5) * grid.width / len(columns), top - line / 2), text, anchor="mm")
    for row, text in enumerate(rows):
        write((left - 4, top + (row + 0.5) * grid.height / len(rows)), text, anchor="rm")
    return picture


def caption_grid(images: list[PIL.Image.Image], captions: Sequence[str], *, columns: int = 5) -> PIL.Image.Image:
    """Images of one size side by side, each with its caption below, wrapped to at most four lines.

    Args:
        images: At least one; small ones are enlarged by repeating pixels.
        captions: One per image.
        columns: Images in a row, at most.
    """
    # The size of a cell: an image, its frame and the longest caption.
    font, line = PIL.ImageFont.load_default(14), 18
    columns, zoom = min(columns, len(images)), -(-160 // images[0].width)  # room for about 20 letters
    width, height = images[0].width * zoom, images[0].height * zoom
    texts = [_wrap(caption, font, width - 4, num_lines=4) for caption in captions]
    top, bottom = FRAME, 4 + line * max(text.count("\n") + 1 for text in texts)
    cell = (width + 2 * FRAME, height + 2 * FRAME + bottom)

    # The cells.
    rows = -(-len(images) // columns)
    picture = PIL.Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = PIL.ImageDraw.Draw(picture)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, above = index % columns * cell[0] + FRAME, index // columns * cell[1] + top
        picture.paste(image.resize((width, height), PIL.Image.Resampling.NEAREST), (left, above))
        draw.multiline_text((left + 2, above + height + 2), text, fill="black", font=font, spacing=line - 14)
    return picture


def name_classes(
    labels: Sequence[int], *, num_classes: int, id2label: Mapping[str, str] | None = None
) -> tuple[int, dict[str, list[str]]]:
    """The number of columns for a grid of class samples, and the labels for `add_labels`.

    Up to ten classes get one column each, with the name above. With more, each row is labelled "first to last". There
    are no labels for a model without classes, or if the images do not cycle through the classes.

    Args:
        labels: The class ids of the images, at least one.
        num_classes: The model's number of classes; 0 for an unconditional model.
        id2label: Class id, as a string, to name; classes without a name are labelled with their id.
    """
    if num_classes == 0 or any(label != (labels[0] + index) % num_classes for index, label in enumerate(labels)):
        return min(10, len(labels)), {}
    columns = min(10 - 10 % num_classes if num_classes <= 10 else 10, len(labels))
    names = [str((id2label or {}).get(str(label), label)) for label in labels]
    rows = [names[start : start + columns] for start in range(0, len(names), columns)]
    if columns % num_classes == 0 or len(rows) == 1:
        return columns, {"columns": rows[0]}
    ends = [[name if len(name) <= 12 else f"{name[:11]}…" for name in row[:: max(len(row) - 1, 1)]] for row in rows]
    return columns, {"rows": [" to ".join(row) for row in ends]}


def _wrap(text: str, font: PIL.ImageFont.FreeTypeFont, width: int, *, num_lines: int) -> str:
    """Wraps a text to at most `num_lines` lines of `width` pixels; what does not fit is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or len(lines) == num_lines or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(text: str, font: PIL.ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a text as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def save_image(image: PIL.Image.Image, path: Path) -> None:
    """Writes a PNG atomically, and makes its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        image.save(temporary, format="PNG")


def save_curve(points: list[tuple[float, float]], path: Path, *, x_label: str, y_label: str) -> None:
    """Writes a PNG of points joined by lines; needs matplotlib."""
    save_curves({"": points}, path, x_label=x_label, y_label=y_label)


def save_curves(
    curves: Mapping[str, Sequence[tuple[Any, float]]],
    path: Path,
    *,
    x_label: str,
    y_label: str,
    best: tuple[Any, float] | None = None,
) -> None:
    """Writes a PNG of points joined by lines; needs matplotlib.

    Args:
        curves: Legend label to points (x, y). x is a number, or a text; points with texts are not joined.
        path: The PNG.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        best: A point to circle; None for none.
    """
    from matplotlib.figure import Figure

    # The points.
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    is_text = any(isinstance(x, str) for points in curves.values() for x, _ in points)
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", linestyle="none" if is_text else "-", label=label or None)
    if best is not None:
        axes.plot(
            *best, marker="o", markersize=12, fillstyle="none", linestyle="none", color="black", label="best here"
        )

    # Grid, tick labels and legend.
    axes.grid(alpha=0.3)
    if is_text:
        axes.tick_params(axis="x", labelrotation=30)
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
    if len(curves) > 1:
        axes.legend(fontsize="small")

    # The file.
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=120)
    save_image(PIL.Image.open(pixels), path)
