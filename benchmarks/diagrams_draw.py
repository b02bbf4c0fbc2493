# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The two pictures of diagrams.py. Lengths are in inches of a figure that is 830 pixels wide in a README."""

import io
import math

import numpy as np
import torch
from diagrams_forwards import GuidedStep, RoutedForward
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle


WIDTH, DPI = 8.3, 200
INK, GREY, PALE, LANE = "#1f2328", "#6e7781", "#eef1f4", "#e8590c"
SHADES = LinearSegmentedColormap.from_list("shades", colormaps["Blues"](np.linspace(0.2, 1, 64)))


# ------------------------------------------------------------------------------------------------------------- routing


def draw_routing(forward: RoutedForward) -> Figure:
    """One row of an image's tokens on their way through the blocks: a cell per token and block that it passed, in the
    shade of the change; its `gid` is "token/block". What skips the route has a line instead."""
    figure, axes = canvas(3.75)
    num_tokens = len(forward.changes)
    rows = math.isqrt(num_tokens)
    ids = most_even_row(forward.kept, rows)
    num_blocks, side, pitch = forward.changes.shape[1], 1.8, 0.27
    left, bottom = 2.72, 0.92  # of the cells
    top = bottom + rows * pitch

    # The image in tokens, and the row of it that is followed.
    y = bottom + (rows * pitch - side) / 2
    draw_tokens(axes, forward.noisy, forward.kept, num_tokens=num_tokens, x=0.2, y=y, side=side)
    row, height = int(ids[0]) // rows, side / rows
    low = y + side - (row + 1) * height
    axes.add_patch(Rectangle((0.2, low), side, height, fill=False, edgecolor=INK, linewidth=1.6, zorder=3))
    for start, end in ((low, bottom), (low + height, top)):
        axes.plot([0.2 + side, left - pitch - 0.08], [start, end - 0.02], color=GREY, linewidth=0.8)
    write(axes, 0.2 + side / 2, top + 0.42, f"{num_tokens} tokens", weight="bold")
    write(axes, 0.2 + side / 2, top + 0.2, f"{len(forward.kept)} kept, the pale ones routed", size=9)

    # The route.
    route, kept = forward.route, set(forward.kept.tolist())
    x, width = left + route.start * pitch, (route.end - route.start + 1) * pitch
    axes.add_patch(rounded(x - 0.02, bottom - 0.05, width, rows * pitch + 0.08, color=PALE))
    write(axes, x + width / 2, top + 0.42, f"blocks {route.start} to {route.end}", weight="bold")
    write(axes, x + width / 2, top + 0.2, "run on the kept tokens alone", size=9)

    # Cells and lanes.
    norm = LogNorm(float(np.nanmin(forward.changes[ids])), float(np.nanmax(forward.changes[ids])))
    for index, token in enumerate(ids.tolist()):
        y = top - (index + 1) * pitch
        draw_image(axes, token_pixels(forward.noisy, token, rows), x=left - pitch - 0.06, y=y, side=pitch - 0.04)
        for block, change in enumerate(forward.changes[token].tolist()):
            if not math.isnan(change):
                cell = Rectangle((left + block * pitch, y), pitch - 0.04, pitch - 0.04, color=SHADES(norm(change)))
                cell.set(gid=f"{token}/{block}", linewidth=0, zorder=2)
                axes.add_patch(cell)
        if token not in kept:
            ends = left + route.start * pitch - 0.03, left + (route.end + 1) * pitch - 0.01
            draw_arrow(axes, (ends[0], y + pitch / 2 - 0.02), (ends[1], y + pitch / 2 - 0.02), color=LANE)
    for block in range(num_blocks):
        write(axes, left + (block + 0.5) * pitch - 0.02, bottom - 0.18, str(block), size=9)

    # What comes out, and what the shades mean.
    right = left + num_blocks * pitch
    x = WIDTH - 0.2 - side + 0.12
    y = bottom + (rows * pitch - side + 0.12) / 2
    draw_arrow(axes, (right + 0.04, top - rows * pitch / 2), (x - 0.06, top - rows * pitch / 2))
    draw_image(axes, pixels(forward.clean), x=x, y=y, side=side - 0.12)
    write(axes, x + (side - 0.12) / 2, top + 0.42, "prediction", weight="bold")
    write(axes, x + (side - 0.12) / 2, top + 0.2, "of all tokens", size=9)
    draw_legend(axes, norm, x=left, y=0.3)
    return figure


def most_even_row(kept: torch.Tensor, rows: int) -> torch.Tensor:
    """The ids of the tokens of the row nearest to the middle of which about half is kept."""
    off = (2 * torch.bincount(kept // rows, minlength=rows) - rows).abs()  # twice how far from half
    row = min(range(rows), key=lambda row: (max(2, int(off[row])), abs(2 * row + 1 - rows)))
    return torch.arange(row * rows, (row + 1) * rows)


def draw_legend(axes: Axes, norm: LogNorm, *, x: float, y: float) -> None:
    """What the shades and the lanes mean."""
    gradient = SHADES(np.linspace(0, 1, 64))[None]
    axes.imshow(gradient, extent=(x + 0.14, x + 0.94, y - 0.06, y + 0.06), aspect="auto")
    write(axes, x + 0.07, y, f"{norm.vmin:.1g}", size=9, align="right")
    write(axes, x + 1.0, y, f"{norm.vmax:.1g}  norm of what a block adds (log)", size=9, align="left")
    draw_arrow(axes, (x + 3.72, y), (x + 4.22, y), color=LANE)
    write(axes, x + 4.3, y, "skips and rejoins", size=9, align="left")


# ------------------------------------------------------------------------------------------------------------ guidance


def draw_guidance(step: GuidedStep) -> Figure:
    """The branches of a step one above the other, from the noisy image to the guided prediction."""
    figure, axes = canvas(4.5)
    side, gap = 1.3, 0.35
    x = [0.2 + column * (side + gap) for column in range(5)]
    high, low = 2.5, 0.5
    middle = (high + low) / 2

    # What both share.
    draw_image(axes, pixels(step.noisy), x=x[0], y=middle, side=side)
    caption(axes, x[0], middle, side, "noisy image", f"step {step.step + 1} of {step.num_steps}")
    if step.shares_prefix:
        write(axes, x[0] + side / 2, middle - 0.18, f"blocks 0 to {step.route.start - 1}", size=9)
        write(axes, x[0] + side / 2, middle - 0.36, "run once for both", size=9)

    # The branches.
    for name, y, kept, clean in zip(("strong", "weak"), (high, low), step.kept, step.clean, strict=True):
        draw_tokens(axes, step.noisy, kept, num_tokens=step.num_tokens, x=x[1], y=y, side=side)
        draw_image(axes, pixels(clean), x=x[2], y=y, side=side)
        caption(axes, x[1], y, side, f"{name} branch", f"{len(kept)} of {step.num_tokens} tokens")
        caption(axes, x[2], y, side, name, "predicted image")
        draw_arrow(axes, (x[0] + side + 0.05, middle + side / 2), (x[1] - 0.05, y + side / 2))
        draw_arrow(axes, (x[1] + side + 0.05, y + side / 2), (x[2] - 0.05, y + side / 2))
        draw_arrow(axes, (x[2] + side + 0.05, y + side / 2), (x[3] - 0.05, middle + side / 2))

    inside = f"blocks {step.route.start} to {step.route.end} run on these tokens"
    write(axes, x[1] + side / 2, low - 0.2, inside, size=9)

    # Their difference and the guided prediction.
    difference = step.clean[0] - step.clean[1]
    gain = 2 ** max(0, int(-difference.abs().quantile(0.99).log2()))  # what nearly all pixels bear
    draw_image(axes, pixels(gain * difference), x=x[3], y=middle, side=side)
    caption(axes, x[3], middle, side, "strong − weak", f"{gain} times, grey is 0")
    draw_arrow(axes, (x[3] + side + 0.05, middle + side / 2), (x[4] - 0.05, middle + side / 2))
    draw_image(axes, pixels(step.guided), x=x[4], y=middle, side=side)
    caption(axes, x[4], middle, side, "guided", f"weak + {step.guidance_scale:g} (strong − weak)")
    return figure


def caption(axes: Axes, x: float, y: float, side: float, title: str, text: str) -> None:
    """Two lines above a picture."""
    write(axes, x + side / 2, y + side + 0.34, title, weight="bold")
    write(axes, x + side / 2, y + side + 0.14, text, size=9)


# --------------------------------------------------------------------------------------------------------------- parts


def canvas(height: float) -> tuple[Figure, Axes]:
    """A white card whose coordinates are inches from its lower left corner."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, WIDTH), ylim=(0, height), autoscale_on=False)
    return figure, axes


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def pixels(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] as [H, W, 3] in [0, 1]."""
    return (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def token_pixels(image: torch.Tensor, token: int, rows: int) -> np.ndarray:
    """The patch of a token of `rows` x `rows`."""
    size = image.shape[1] // rows
    top, left = (index * size for index in divmod(token, rows))
    return pixels(image)[top : top + size, left : left + size]


def draw_image(axes: Axes, image: np.ndarray, *, x: float, y: float, side: float) -> None:
    axes.imshow(image, extent=(x, x + side, y, y + side), aspect="auto", interpolation="nearest", zorder=2)


def draw_tokens(
    axes: Axes, image: torch.Tensor, kept: torch.Tensor, *, num_tokens: int, x: float, y: float, side: float
) -> None:
    """A square image cut into tokens, of which the kept ones are as they are and the others pale."""
    rows = math.isqrt(num_tokens)
    pitch, known = side / rows, set(kept.tolist())
    for token in range(num_tokens):
        row, column = divmod(token, rows)
        patch = token_pixels(image, token, rows)
        patch = patch if token in known else 0.85 + 0.15 * patch
        corner = {"x": x + column * pitch + 0.01, "y": y + side - (row + 1) * pitch + 0.01}
        draw_image(axes, patch, **corner, side=pitch - 0.02)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = GREY) -> None:
    style = {"arrowstyle": "-|>,head_length=0.35,head_width=0.18", "color": color, "linewidth": 1.6}
    axes.annotate("", end, start, arrowprops=style | {"shrinkA": 0, "shrinkB": 0}, zorder=3)


def rounded(x: float, y: float, width: float, height: float, *, color: str) -> FancyBboxPatch:
    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", color=color, linewidth=0)


def write(axes: Axes, x: float, y: float, text: str, *, size: float = 11, align: str = "center", weight="normal"):
    axes.text(x, y, text, fontsize=size, color=INK, ha=align, va="center", weight=weight)
