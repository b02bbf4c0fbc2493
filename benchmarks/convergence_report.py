# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the runs of convergence.py say: curves over seeds, the way to equal losses, a table, a figure, sample sheets.

A run is a dict with its `points`; a point has "step", "seconds", "flops" and "heldout_loss", and some have "samples".
"""

import io
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from common import write_whole
from convergence_data import Images
from convergence_train import BASELINE

from diffusers_tread.pictures import add_labels, make_grid, save_image


NUM_LEVELS = 5  # of held-out loss, at which times are compared
ZOOMED = 96  # pixels of an image's side in a sample sheet
Run = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------- comparing


def summarise(runs: list[Run], *, decay: float) -> dict[str, Any]:
    """Per variant what its finished runs came to and, where the seed has a finished dense run, how they compare.

    Args:
        runs: Of the report.
        decay: Share of the steps in which the learning rate falls.
    """
    finished = [run for run in runs if run["finished"]]
    baselines = {run["seed"]: run for run in finished if run["variant"] == BASELINE}
    summary = {}
    for name in dict.fromkeys(run["variant"] for run in finished):
        own = [run for run in finished if run["variant"] == name]
        pairs = [(baselines[run["seed"]], run) for run in own if run["seed"] in baselines]
        summary[name] = {
            "seeds": [run["seed"] for run in own],
            "curve": curve(own),
            "step_seconds": spread(step_seconds(run) for run in own),
            "flops_per_step": own[0]["points"][-1]["flops"] / own[0]["points"][-1]["step"],
            "against_dense": compare(pairs, decay=decay) if pairs and name != BASELINE else None,
        }
    return summary


def curve(runs: list[Run]) -> list[dict[str, Any]]:
    """The points that all runs of a variant have, with mean, least and largest over the seeds."""
    points = []
    for together in zip(*(run["points"] for run in runs), strict=True):
        point = {"step": together[0]["step"], "flops": together[0]["flops"]}
        point |= {name: spread(one[name] for one in together) for name in ("seconds", "heldout_loss")}
        for scale in together[0].get("samples", {}):
            verdicts = [one["samples"][scale] for one in together]
            point.setdefault("samples", {})[scale] = {
                name: spread(verdict[name] for verdict in verdicts) for name in ("distance", "recognised")
            }
        points.append(point)
    return points


def compare(pairs: list[tuple[Run, Run]], *, decay: float) -> dict[str, Any]:
    """Runs of one variant with the dense ones of the same seeds; ratios are dense over the variant."""
    ends = [(dense["points"][-1], other["points"][-1]) for dense, other in pairs]
    result = {
        "step_time_ratio": spread(step_seconds(dense) / step_seconds(other) for dense, other in pairs),
        "flop_ceiling": (ends[0][0]["flops"] / ends[0][0]["step"]) / (ends[0][1]["flops"] / ends[0][1]["step"]),
        "final_loss_ratio": spread(dense["heldout_loss"] / other["heldout_loss"] for dense, other in ends),
        "equal_flops_loss_ratio": spread(loss_ratio_at_equal_flops(*pair, decay=decay) for pair in pairs),
        "loss_levels": (levels := common_levels(pairs)),
    }
    for what in ("seconds", "flops"):
        ratios = [
            [reach(dense, level, what) / reach(other, level, what) for level in levels] for dense, other in pairs
        ]
        result[f"{what}_to_equal_loss"] = {"by_seed": ratios, **median([ratio for one in ratios for ratio in one])}
    return result


def common_levels(pairs: list[tuple[Run, Run]]) -> list[float]:
    """Losses that all runs pass after their first evaluation, evenly in their logarithm; none where there are none."""
    losses = [[point["heldout_loss"] for point in run["points"][1:]] for pair in pairs for run in pair]
    highest, lowest = min(one[0] for one in losses), max(min(one) for one in losses)
    if lowest >= highest:
        return []
    return np.geomspace(highest, lowest, NUM_LEVELS).tolist()


def reach(run: Run, level: float, what: str) -> float:
    """Seconds, FLOPs or steps until the held-out loss first falls to a level, on lines between logarithms.

    Curves of losses are nearly straight there. The start, at zero, is left out: the level lies below the first
    evaluation's loss, or is it.
    """
    points = run["points"][1:]
    if math.isclose(points[0]["heldout_loss"], level):
        return points[0][what]
    for before, after in zip(points, points[1:], strict=False):
        if after["heldout_loss"] <= level * (1 + 1e-9):
            return between(before, after, "heldout_loss", level, what)
    raise ValueError(f"Expected a level that the run reaches, got {level}.")


def loss_at(run: Run, what: str, value: float) -> float:
    """The held-out loss after so many seconds, FLOPs or steps, from the first evaluation on."""
    points = run["points"][1:]
    for before, after in zip(points, points[1:], strict=False):
        if after[what] >= value:
            return between(before, after, what, value, "heldout_loss")
    return points[-1]["heldout_loss"]


def between(before: dict[str, Any], after: dict[str, Any], given: str, value: float, wanted: str) -> float:
    """What is `wanted` where `given` has a value, on a line between the logarithms of two points."""
    start, end = math.log(before[given]), math.log(after[given])
    share = 1.0 if start == end else (math.log(value) - start) / (end - start)
    return math.exp((1 - share) * math.log(before[wanted]) + share * math.log(after[wanted]))


def loss_ratio_at_equal_flops(dense: Run, other: Run, *, decay: float) -> float:
    """Dense over the variant's loss after as many FLOPs, the most that both have before their learning rates fall:
    one that has fallen lowers the loss by itself."""
    steady = [
        max(point["flops"] for point in run["points"] if point["step"] <= (1 - decay) * run["points"][-1]["step"])
        for run in (dense, other)
    ]
    flops = max(min(steady), *(run["points"][1]["flops"] for run in (dense, other)))
    return loss_at(dense, "flops", flops) / loss_at(other, "flops", flops)


def step_seconds(run: Run) -> float:
    return run["points"][-1]["seconds"] / run["points"][-1]["step"]


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def median(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "min": None, "max": None}
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ----------------------------------------------------------------------------------------------------------- reporting


def table(report: dict[str, Any]) -> str:
    """A line per variant as Markdown: means over the seeds, with the least and the largest."""
    scales = [f"{scale:g}" for scale in report["settings"]["guidance_scales"]]
    columns = ["variant", "seeds", "step, ms", "speed-up, of its ceiling", "held-out loss at the end"]
    columns += [
        "dense loss over its, at the end",
        "at equal FLOPs",
        "dense time over its, to equal loss",
        "dense FLOPs over its",
    ]
    for scale in scales:
        guided = "" if scale == "1" else f", CFG {scale}"
        columns += [f"Fréchet distance{guided}", f"recognised{guided}"]
    lines = [columns, ["---"] * len(columns)]
    for name, own in report["summary"].items():
        end, against = own["curve"][-1], own["against_dense"]
        cells = [name, str(len(own["seeds"])), form(own["step_seconds"], "{:.1f}", 1e3)]
        if against is None:
            cells += ["-", form(end["heldout_loss"], "{:.4f}"), "-", "-", "-", "-"]
        else:
            ratio, ceiling = against["step_time_ratio"]["mean"], against["flop_ceiling"]
            cells += [f"{ratio:.2f}, {ratio / ceiling:.0%} of {ceiling:.2f}", form(end["heldout_loss"], "{:.4f}")]
            cells += [form(against[f"{where}_loss_ratio"], "{:.3f}") for where in ("final", "equal_flops")]
            cells += [form(against[f"{what}_to_equal_loss"], "{:.2f}") for what in ("seconds", "flops")]
        for scale in scales:
            verdict = end["samples"][scale]
            cells += [form(verdict["distance"], "{:.2f}"), form(verdict["recognised"], "{:.1%}")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{conditions(report)}"


def conditions(report: dict[str, Any]) -> str:
    """Sentences on what the table's numbers are of."""
    data, judge, settings = report["data"], report["judge"], report["settings"]
    model = f"width {settings['width']}"
    if settings.get("model") is not None:
        config = json.loads(settings["model"])
        model = ", ".join([config.pop("_class_name"), *(f"{name} {value}" for name, value in config.items())])
    return (
        f"{data['train_images']:,} images of {data['size']} pixels in {data['classes']} classes, {model}, "
        f"{settings['depth']} blocks, batch {settings['batch_size']}, {settings['steps']:,} "
        f"steps. Means over seeds, in brackets least and most; the ways to equal loss are medians over seeds and "
        f"{NUM_LEVELS} losses. Distances are of {judge['samples']:,} samples in a small classifier's features (real "
        f"images: {judge['distance_of_real_images']:.2f}), which recognises {judge['heldout_accuracy']:.1%} of "
        "held-out images. Equal FLOPs are compared before the learning rate falls."
    )


def form(values: dict[str, float | None], pattern: str, factor: float = 1.0) -> str:
    middle = values.get("mean", values.get("median"))
    if middle is None:
        return "-"
    middle, low, high = (pattern.format(factor * value) for value in (middle, values["min"], values["max"]))
    return middle if low == high else f"{middle} ({low} to {high})"


def plot(report: dict[str, Any], path: Path, *, against: str) -> None:
    """Held-out loss against steps and against time or FLOPs, Fréchet distance against the latter; bands over seeds.

    Args:
        report: With at least one finished run.
        path: PNG file to write.
        against: "seconds" or "flops".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(16, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    title = {"seconds": "seconds of training steps", "flops": "FLOPs of training"}[against]
    for number, (name, own) in enumerate(report["summary"].items()):
        points, style = own["curve"][1:], {"color": f"C{number}", "marker": "."}
        losses = [point["heldout_loss"] for point in points]
        draw_band(left, [point["step"] for point in points], losses, label=name, **style)
        draw_band(middle, [position(point, against) for point in points], losses, label=name, **style)
        judged = [point for point in points if "samples" in point]
        for order, scale in enumerate(judged[0]["samples"] if judged else ()):
            distances = [point["samples"][scale]["distance"] for point in judged]
            where, label = [position(point, against) for point in judged], f"{name}, CFG {scale}" if order else name
            draw_band(right, where, distances, label=label, linestyle=["-", "--", ":"][order % 3], **style)
    right.axhline(report["judge"]["distance_of_real_images"], color="black", linewidth=1, label="real images")

    fine, coarse = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5)  # what of each decade has a number
    for axis, x_label, y_label, numbers in (
        (left, "steps", "held-out loss", fine),
        (middle, title, "held-out loss", fine),
        (right, title, "Fréchet distance of a classifier's features", coarse),
    ):
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=numbers))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_whole(path, buffer.getvalue())


def position(point: dict[str, Any], against: str) -> float:
    return point[against] if against == "flops" else point[against]["mean"]


def draw_band(axis, x: list[float], values: list[dict[str, float]], **style: Any) -> None:
    """A line of the means in a band from the least to the largest."""
    axis.plot(x, [value["mean"] for value in values], **style)
    low, high = ([value[name] for value in values] for name in ("min", "max"))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


class SampleSheet:
    """A picture with a row of images per variant, under one of real images, and a column per class.

    The rows are also in an .npz file beside it, for a run that goes on.

    Args:
        path: PNG file to write.
        images: Whose first held-out image of each class makes the first row.
        keep: Whether the rows that the file beside has stay.
    """

    def __init__(self, path: Path, images: Images, *, keep: bool):
        self.path, self.beside, self.class_names = path, path.with_suffix(".npz"), images.class_names
        _, first = np.unique(images.heldout_labels, return_index=True)
        self.rows = {"real": images.heldout_images[first]}
        if keep and self.beside.exists():
            with np.load(self.beside) as before:
                self.rows |= dict(before)

    def add(self, name: str, row: np.ndarray) -> None:
        """Adds a row, uint8 [classes, H, W, 3], and writes both files."""
        self.rows[name] = row
        np.savez_compressed(buffer := io.BytesIO(), **self.rows)
        write_whole(self.beside, buffer.getvalue())
        images = [PIL.Image.fromarray(image) for one in self.rows.values() for image in one]
        images = [image.resize((ZOOMED, ZOOMED), PIL.Image.Resampling.NEAREST) for image in images]
        grid = make_grid(images, columns=len(self.class_names))
        save_image(add_labels(grid, rows=list(self.rows), columns=self.class_names), self.path)
