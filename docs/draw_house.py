# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Draws the house of architecture.md: the packages, floor by floor, and who imports whom.

    python docs/draw_house.py

Floors and imports are those of tests/test_architecture.py, which also compares the committed drawing with them. An
arrow is left out where a way over others leads to the same place. The modules below routing are one box, the cellar.
"""

import runpy
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "images" / "house.svg"
WIDTH, FLOOR, BOX_WIDTH, BOX_HEIGHT, MARGIN = 860, 76, 120, 36, 12  # pixels

Arrows = set[tuple[str, str]]  # who imports, and what is imported


def arrows_of(house: dict[str, Any], names: set[str]) -> Arrows:
    """The imports between the named packages and modules, without those that others imply."""
    arrows = {
        (house["folder"](name), house["folder"](other))
        for name in house["modules"]()
        if "." in name
        for other in house["imports_of"](name, deferred=True)
    }
    arrows = {(here, there) for here, there in arrows if here != there and {here, there} <= names}
    return {(here, there) for here, there in arrows if there not in reachable(here, arrows - {(here, there)})}


def reachable(start: str, arrows: Arrows) -> set[str]:
    """What `start` imports, directly or over others."""
    nexts = {there for here, there in arrows if here == start}
    return nexts.union(*(reachable(name, arrows) for name in nexts))


def draw(house: dict[str, Any]) -> str:
    """The drawing as SVG."""
    ground = next(floor for floor, names in enumerate(house["FLOORS"]) if "routing" in names)
    floors = [sorted(names) for names in reversed(house["FLOORS"][ground:])]
    cellar = sorted(set().union(*house["FLOORS"][:ground]))
    arrows = arrows_of(house, set().union(*floors))

    middle = {
        name: (WIDTH * (column + 0.5) / len(names), MARGIN + BOX_HEIGHT / 2 + floor * FLOOR)
        for floor, names in enumerate(floors)
        for column, name in enumerate(names)
    }
    bottom = MARGIN + len(floors) * FLOOR
    height = bottom + BOX_HEIGHT + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#5b7083"/></marker>',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *(curve(middle[here], middle[there]) for here, there in sorted(arrows)),
            *(box(name, *middle[name], BOX_WIDTH) for names in floors for name in names),
            box(" · ".join(cellar), WIDTH / 2, bottom + BOX_HEIGHT / 2, WIDTH - MARGIN),
            "</svg>\n",
        ]
    )


def curve(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From the lower edge of one box to the upper edge of another."""
    (x0, y0), (x1, y1) = start, end
    y0, y1 = y0 + BOX_HEIGHT / 2, y1 - BOX_HEIGHT / 2
    bend = (y1 - y0) / 2
    path = f"M{x0:.0f} {y0:.0f} C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"
    return f'<path d="{path}" fill="none" stroke="#5b7083" stroke-width="1.3" marker-end="url(#tip)"/>'


def box(text: str, x: float, y: float, width: float) -> str:
    """A rounded box around a text, by its middle."""
    left, top = x - width / 2, y - BOX_HEIGHT / 2
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6" fill="#eaf1f8" '
        f'stroke="#33658a"/><text x="{x:.0f}" y="{y + 5:.0f}" font-size="14" fill="#12263a" '
        f'text-anchor="middle">{text}</text>'
    )


if __name__ == "__main__":
    DRAWING.write_text(draw(runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))), encoding="utf-8")
