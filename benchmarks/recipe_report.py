# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What recipe.py found: curves over seeds, what variants reach at equal steps and at equal time, what a step costs."""

import io
from pathlib import Path
from typing import Any

from common import write_whole
from convergence_report import curve, draw_band, form, spread
from convergence_train import BASELINE


Report = dict[str, Any]
# Where variants are compared, and by which cost of a step.
COSTS = {"equal_time": "seconds", "equal_kernel_time": "kernel_seconds"}
TITLES = {
    "equal_steps": "steps",
    "equal_time": "at equal time: steps",
    "equal_kernel_time": "at equal kernel time: steps",
}


def summarise(report: Report) -> dict[str, Any]:
    """Per variant with finished runs its curve over the seeds, and the points where variants are compared."""
    finished = [run for run in report["runs"] if run["finished"]]
    summary = {}
    trained = {run["variant"] for run in finished}
    for name in [name for name in report["steps"] if name in trained]:
        own = [run for run in finished if run["variant"] == name]
        steps = {"equal_steps": report["settings"]["steps"], **end_steps(report, name)}
        summary[name] = {
            "seeds": [run["seed"] for run in own],
            "step_seconds": step_cost(report["steps"][name], "seconds"),
            "kernel_seconds": step_cost(report["steps"][name], "kernel_seconds"),
            "curve": curve(own),
            **{where: reached(own, step) for where, step in steps.items()},
        }
    return summary


def end_steps(report: Report, name: str) -> dict[str, int]:
    """The steps at which a variant has taken as long as the dense one; none where one of them was not timed."""
    ends = {}
    for where, kind in COSTS.items():
        own, dense = (step_cost(report["steps"].get(one, {}), kind) for one in (name, BASELINE))
        if own and dense:
            ends[where] = max(round(report["settings"]["steps"] * dense / own), 1)
    return ends


def step_cost(row: dict[str, Any], kind: str) -> float | None:
    """Seconds of a step, the median of them, or of its kernels."""
    return row.get(kind, {}).get("median") if kind == "seconds" else row.get(kind)


def reached(runs: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Loss and distances of the runs after a step at which they were judged, over the seeds."""
    points = [next(point for point in run["points"] if point["step"] == step) for run in runs]
    return {"step": step} | {
        "heldout_loss": spread(point["heldout_loss"] for point in points),
        "distance": {
            scale: spread(point["samples"][scale]["distance"] for point in points) for scale in points[0]["samples"]
        },
    }


def table(report: Report) -> str:
    """Two tables as Markdown, what was learned and what a step costs, and what the numbers are of."""
    tables = [learning_table(report)] if report["summary"] else []
    return "\n\n".join([*tables, cost_table(report), conditions(report)])


def learning_table(report: Report) -> str:
    """Guided samples are compared at equal steps alone."""
    first, *others = [f"{scale:g}" for scale in report["settings"]["guidance_scales"]]
    scales = {where: [first, *others] if where == "equal_steps" else [first] for where in TITLES}
    titles = {key: title for key, title in TITLES.items() if any(key in own for own in report["summary"].values())}
    columns = ["variant", "seeds"]
    for where, title in titles.items():
        columns += [title, "held-out loss"]
        columns += ["Fréchet distance" if scale == "1" else f"with CFG {scale}" for scale in scales[where]]
    lines = [columns, ["---"] * len(columns)]
    for name, own in report["summary"].items():
        cells = [name, str(len(own["seeds"]))]
        for where in titles:
            if where not in own:
                cells += ["-"] * (2 + len(scales[where]))
                continue
            cells += [str(own[where]["step"]), form(own[where]["heldout_loss"], "{:.4f}")]
            cells += [form(own[where]["distance"][scale], "{:.2f}") for scale in scales[where]]
        lines.append(cells)
    return as_markdown(lines)


def cost_table(report: Report) -> str:
    """Each variant's step beside that of its base without pieces."""
    kernels = any(step_cost(row, "kernel_seconds") for row in report["steps"].values())
    costs = ["step, ms", *(["kernels, ms"] if kernels else []), "GFLOP an image"]
    columns = ["variant", *(column for cost in costs for column in (cost, "over its base"))]
    lines = [columns, ["---"] * len(columns)]
    for name, row in report["steps"].items():
        base = report["steps"].get(name.split("+")[0], {})
        seconds, per_image = row["seconds"], row["flops"] / report["settings"]["batch_size"]
        quartiles = " to ".join(f"{1e3 * seconds[f'{one}_quartile']:.1f}" for one in ("first", "third"))
        cells = [name, f"{1e3 * seconds['median']:.1f} ({quartiles})"]
        cells.append(over(*(step_cost(one, "seconds") for one in (row, base))))
        if kernels:
            own, of_base = (step_cost(one, "kernel_seconds") for one in (row, base))
            cells += [f"{1e3 * own:.1f}" if own else "-", over(own, of_base)]
        lines.append([*cells, f"{per_image / 1e9:.2f}", over(row["flops"], base.get("flops"))])
    return as_markdown(lines)


def over(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "-"


def as_markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(report: Report) -> str:
    """Sentences on what the tables' numbers are of."""
    data, judge, settings = report["data"], report["judge"], report["settings"]
    told = (
        f"{data['train_images']:,} images of {data['size']} pixels in {data['classes']} classes, width "
        f"{settings['width']}, {settings['depth']} blocks, batch {settings['batch_size']}, {settings['dtype']}, "
        f"{'compiled blocks' if settings['compile'] else 'not compiled'}. Means over seeds, in brackets least and "
        f"most. Distances are of {judge['samples']:,} samples of {settings['sampling_steps']} steps in a small "
        f"classifier's features (real images: {judge['distance_of_real_images']:.2f}). Equal time is that of "
        f"{settings['steps']:,} dense steps by the step times below, medians of {settings['repeats']} turns of "
        f"{settings['steps_per_turn']} steps with their quartiles, one process, nothing else on the device; equal "
        "kernel time leaves out what a GPU waits for launches. Pieces "
        f"are compared with the base that they are added to, in FLOPs with teacher, projector and Muon. "
        f"{rates(report)}"
    )
    if report["failures"]:
        failed = [one["what"] for one in report["failures"]]
        told += f" Failed: {'; '.join(failed) if report['summary'] else f'all {len(failed)} runs'}."
    return told


def rates(report: Report) -> str:
    """How the learning rates were chosen."""
    parts = []
    for flag, name in (("lr", "AdamW's rate"), ("muon_lr", "Muon's")):
        rows = sorted((row for row in report["sweep"] if row["flag"] == flag), key=lambda row: row["rate"])
        if not rows:
            continue
        losses = ", ".join(
            f"{row['rate']:g}: " + ("failed" if row["heldout_loss"] is None else f"{row['heldout_loss']:.4f}")
            for row in rows
        )
        parts.append(f"{name} is {report['settings'][flag]:g} (held-out loss of {rows[0]['variant']} with {losses})")
    if not parts:
        return f"AdamW's rate is {report['settings']['lr']:g}."
    return f"After {report['settings']['sweep_steps']} steps of another seed the best rates were taken: " + (
        f"{'; '.join(parts)}."
    )


def plot(report: Report, path: Path) -> None:
    """Held-out loss and Fréchet distance against steps, time and, where known, time of kernels; bands over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    summary, scale = report["summary"], f"{report['settings']['guidance_scales'][0]:g}"
    units = {"steps": None, "seconds of steps on an idle device": "step_seconds"}
    if all(own["kernel_seconds"] for own in summary.values()):
        units["seconds of kernels"] = "kernel_seconds"
    figure = Figure(figsize=(7.5 * len(units), 10), layout="constrained")
    axes = figure.subplots(2, len(units))
    for number, (name, own) in enumerate(summary.items()):
        points = own["curve"][1:]
        judged = [point for point in points if "samples" in point]
        losses = [point["heldout_loss"] for point in points]
        distances = [point["samples"][scale]["distance"] for point in judged]
        style = {"color": f"C{number % 10}", "marker": ".", "linestyle": ["-", "--", ":"][number // 10]}
        for column, cost in enumerate(units.values()):
            factor = own[cost] if cost else 1
            draw_band(axes[0, column], [factor * point["step"] for point in points], losses, label=name, **style)
            draw_band(axes[1, column], [factor * point["step"] for point in judged], distances, label=name, **style)

    guided = "" if scale == "1" else f", CFG {scale}"
    for row, label in zip(axes, ("held-out loss", f"Fréchet distance{guided}"), strict=True):
        for axis, unit in zip(row, units, strict=True):
            axis.set_xlabel(unit)
            axis.set_ylabel(label)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    write_whole(path, buffer.getvalue())
