# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sweeps over sampling settings: the points of a sweep, and the table and picture of its results."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import whole, write_json
from ..markdown import table_row
from ..metrics import is_higher_better
from ..metrics.registry import value_label
from ..pictures import save_curves


SWEPT = ("guidance", "guidance_scale", "guidance_interval", "guidance_rescale", "strong_ratio", "weak_ratio")
SWEPT += ("guider_config", "guidance_transformer", "num_inference_steps", "scheduler", "scheduler_config")
"""Fields of `SamplingConfig` that a sweep may change."""
_EXAMPLE = '\'{"guidance_scale": [1, 1.5], "guidance_interval": [null, "0.1,0.7"]}\''
RESULTS = "sweep"


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One setting of a sweep."""

    name: str
    """Name of the point's folder, and in the table."""
    values: dict[str, Any]
    """Values for fields of `SamplingConfig`."""


def read_points(text: str, *, scales: Sequence[float] = ()) -> list[SweepPoint]:
    """Reads the points of a sweep.

    Args:
        text: JSON, or the path of a JSON file. Either a grid: an object with a list of values for each field, of which
            each combination is a point. Or a list of points: objects with one value for each field, and optionally a
            "name".
        scales: Values of "guidance_scale", as the first field of the grid, which then has none of its own.

    Raises:
        ValueError: The file does not exist; the JSON is of another form; a field cannot be swept; there are two lists
            of scales; a name is taken, or two points have the same name but for upper case.

    Example:
        >>> from diffusers_tread.runs.sweep import read_points
        >>> [point.name for point in read_points('{"guidance_scale": [1, 1.5], "weak_ratio": [0.8]}')]
        ['guidance_scale-1-weak_ratio-0.8', 'guidance_scale-1.5-weak_ratio-0.8']
    """
    # Grid or list.
    content = _read(text)
    if isinstance(content, dict):
        if scales and "guidance_scale" in content:
            raise ValueError("Expected either --guidance_scales or guidance_scale in --sweep, got both.")
        grid = ({"guidance_scale": list(scales)} if scales else {}) | content
        if not grid or not all(isinstance(values, list) and values for values in grid.values()):
            raise ValueError(f"Expected a list of values for each field of a sweep, such as {_EXAMPLE}, got {grid}.")
        entries = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    elif scales:
        raise ValueError("Expected --guidance_scales with a grid in --sweep, got a list of points.")
    else:
        entries = content

    # Points, each with a name of its own.
    points = [_make_point(entry) for entry in entries]
    names = [point.name.lower() for point in points]  # folders, which some file systems take for the same
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Expected points of a sweep with names of their own, got {twice} more than once.")
    if "features" in names:
        raise ValueError("Expected other names of points than 'features', the folder of the reference's.")
    return points


def find_best(rows: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The row with the best finite value of a metric; None without any."""
    finite = [row for row in rows if math.isfinite(row["metrics"][metric])]
    choose = max if is_higher_better(metric) else min
    return choose(finite, key=lambda row: row["metrics"][metric], default=None)


def write_sweep(folder: Path, rows: Sequence[Mapping[str, Any]], *, num_points: int, sample: str) -> str:
    """Writes `sweep.json`, `sweep.md` and `sweep.png` for the points measured so far.

    Args:
        folder: The sweep's folder.
        rows: `name`, `values` and `metrics` of each measured point, in order; at least one.
        num_points: Number of points of the whole sweep.
        sample: Description of the samples, such as "5,000 samples, seed 0".

    Returns:
        The text of `sweep.md`.
    """
    # JSON and picture.
    metric = next(iter(rows[0]["metrics"]))
    best = find_best(rows, metric)
    write_json(folder / f"{RESULTS}.json", {"best": best and best["name"], "metric": metric, "points": list(rows)})
    _draw(folder / f"{RESULTS}.png", rows, metric=metric, best=best)

    # Table.
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    metrics = list(rows[0]["metrics"])
    lines = [table_row("point", *names, *map(value_label, metrics)), "|---" * (1 + len(names) + len(metrics)) + "|"]
    for row in rows:
        settings = [_told(row["values"].get(name)) for name in names]
        values = [f"{row['metrics'][name]:.4g}" for name in metrics]
        lines.append(table_row(row["name"] + (" (best)" if row is best else ""), *settings, *values))

    # The best point, and a warning about how it was chosen.
    told = f"{len(rows)} of {num_points} points measured. Best {value_label(metric)} on this sample ({sample}): "
    if best is None:
        told += "none is finite."
    else:
        told += (
            f"{best['metrics'][metric]:.4g} of {best['name']}. It was chosen by the samples that it was measured on, "
            "so that it looks better than it is, the more so the more points there are and the fewer samples: measure "
            "it once more with another --seed."
        )
    text = "\n".join([*lines, "", told, ""])
    with whole(folder / f"{RESULTS}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def curves_of(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, dict[str, list[tuple[Any, float]]]]:
    """Chooses the x axis of a picture, and makes one curve for each combination of the other settings that differ.

    The axis is the first field that takes several values, all of them numbers; if there is none, the points' names.
    """
    fields = list(dict.fromkeys(name for row in rows for name in row["values"]))
    seen = {name: {json.dumps(row["values"].get(name)) for row in rows} for name in fields}
    differing = [name for name in fields if len(seen[name]) > 1]
    is_number = {name: all(isinstance(row["values"].get(name), (int, float)) for row in rows) for name in fields}
    axis = next((name for name in differing if is_number[name]), None)
    curves: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        values = row["values"]
        label = "" if axis is None else _label(values, [name for name in differing if name != axis])
        curves.setdefault(label, []).append((row["name"] if axis is None else values[axis], row["metrics"][metric]))
    return axis or "point", {label: sorted(points) if axis else points for label, points in curves.items()}


def _draw(path: Path, rows: Sequence[Mapping[str, Any]], *, metric: str, best: Mapping[str, Any] | None) -> None:
    axis, curves = curves_of(rows, metric)
    place = best and (best["values"][axis] if axis in best["values"] else best["name"])
    save_curves(
        curves,
        path,
        x_label=axis.replace("_", " "),
        y_label=value_label(metric),
        best=best and (place, best["metrics"][metric]),
    )


def _read(text: str) -> Any:
    try:
        source = text if text.lstrip()[:1] in ("{", "[") else Path(text).read_text(encoding="utf-8")
        content = json.loads(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected --sweep as JSON or a file with it, such as {_EXAMPLE}, got: {error}") from error
    is_list = isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content)
    if not (is_list or isinstance(content, dict)):
        raise ValueError(f"Expected an object or a list of objects in --sweep, such as {_EXAMPLE}, got {text!r}.")
    return content


def _make_point(entry: Mapping[str, Any]) -> SweepPoint:
    values = {name: _as_flag(value) for name, value in entry.items() if name != "name"}
    if unknown := sorted(set(values) - set(SWEPT)):
        raise ValueError(f"Expected fields among {list(SWEPT)} in --sweep, got {unknown}.")
    # Make it a valid folder name on any file system.
    told = str(entry.get("name") or "-".join(f"{name}-{_told(value)}" for name, value in values.items()))
    name = re.sub(r"[^\w.+-]+", "-", told).strip("-.")
    if not name or len(name) > 120:
        raise ValueError(f'Expected a "name" of at most 120 letters for the point {dict(entry)} of a sweep.')
    return SweepPoint(name=name, values=values)


def _as_flag(value: Any) -> Any:
    """A value in the format of the command line: an interval as low,high, settings as JSON text."""
    if isinstance(value, list):
        return ",".join(str(one) for one in value)
    return json.dumps(value) if isinstance(value, dict) else value


def _told(value: Any) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _label(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_told(values.get(name))}" for name in names)
