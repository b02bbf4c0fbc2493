# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes the results of the benchmarks into docs/performance.md, and a plot beside it.

    python benchmarks/report.py
    python benchmarks/report.py --check

A block from `<!-- results/NAME.json -->` to `<!-- end -->` becomes the table of the script that wrote that file, with
its command, commit, date, hardware and versions; `<!-- goals -->` becomes the table of goals. --check writes nothing
and exits with 1 if the document is out of date. The plot is not compared: its bytes depend on the release of
matplotlib.
"""

import argparse
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_whole


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^<!-- (?P<name>results/\S+\.json|goals) -->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="Only say whether the document is up to date.")
    add("--document", type=Path, default=ROOT / "docs" / "performance.md", help="What is rewritten.")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="Where the JSON files are.")
    add("--plot", type=Path, default=ROOT / "docs" / "images" / "performance.png", help="PNG file to write.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Gives the exit status."""
    args = parse_args(argv)
    before = args.document.read_text(encoding="utf-8")
    after = render(before, args.results)
    if args.check:
        if after != before:
            print(f"{args.document} differs from the results. Run `python benchmarks/report.py`.", file=sys.stderr)
        return int(after != before)
    write_whole(args.document, after.encode())
    steps = [args.results / name for name in re.findall(r"^<!-- results/(train_step\S*) -->$", after, re.MULTILINE)]
    if reports := [read(path) for path in steps if path.exists()]:
        plot(reports, args.plot)
    return 0


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def render(text: str, results: Path) -> str:
    """The document with its blocks made anew.

    Raises:
        ValueError: A block without end, or a comment that names no block.
    """

    def block(match: re.Match) -> str:
        name = match["name"]
        body = goals_table(results) if name == "goals" else result(results / Path(name).name)
        return f"<!-- {name} -->\n{body}\n<!-- end -->"

    markers = re.findall(r"^<!-- (?:results/|goals|end).*-->$", text, re.MULTILINE)
    if len(markers) != 2 * len(BLOCK.findall(text)):
        raise ValueError(
            f"Expected blocks from <!-- results/NAME.json --> or <!-- goals --> to <!-- end -->, got {markers}."
        )
    return BLOCK.sub(block, text)


def result(path: Path) -> str:
    """The table of a file, and where it comes from."""
    if not path.exists():
        return f"Not measured yet: `make {'bench-gpu' if path.stem.endswith('_gpu') else 'bench'}`."
    report = read(path)
    script = Path(shlex.split(report["command"])[1]).stem
    return f"{importlib.import_module(script).table(report)}\n\n{source(report)}"


def source(report: dict[str, Any]) -> str:
    """One line: command, commit, date, hardware, versions."""
    hardware, versions, state = report["hardware"], report["versions"], report["source"]
    commit = f"commit {state['commit'][:7]}" if state["commit"] else "no commit"
    changed = " with uncommitted changes" if state["dirty"] else ""
    device = hardware["accelerator"] or f"{hardware['cpu']}, {hardware['cpu_cores']} cores"
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "diffusers_tread")
    return f"`{report['command']}`: {commit}{changed}, {report['started'][:10]}, {device}, {others}."


# -------------------------------------------------------------------------------------------------------------- goals


@dataclass(frozen=True, kw_only=True)
class Goal:
    what: str
    script: str
    """Whose result, `results/SCRIPT_cpu.json` and `results/SCRIPT_gpu.json`, tells."""
    value: Callable[[dict[str, Any]], float]
    """Of that report."""
    form: str
    """How a value is written."""
    cpu: float | None = None
    gpu: float | None = None
    is_least: bool = False
    """Whether the goal is a lower bound, not an upper one."""


def step_row(report: dict[str, Any]) -> dict[str, Any]:
    """The row of the largest size at 256 tokens, of a compiled model where there is one."""
    rows = [row for row in report["rows"] if row["num_tokens"] == 256]
    return max(rows, key=lambda row: (row["dense_flops_per_step"] / row["batch_size"], row["mode"] != "eager"))


def guided_speedup(report: dict[str, Any]) -> float:
    """Of the sampler that gains least."""
    return min(row["speedup_over_cfg"] for row in report["rows"] if row["guidance"] == "SG 0.5/0.9")


def seconds_of(report: dict[str, Any], what: str) -> float:
    return next(row["seconds"]["median"] for row in report["rows"] if row["what"] == what)


GOALS = (
    Goal(
        what="routed speed-up over its FLOP ceiling, 256 tokens (B/2 on the CPU, XL/2 compiled on the GPU)",
        script="train_step",
        value=lambda report: step_row(report)["speedup_over_ceiling"],
        form="{:.2f}",
        cpu=0.97,
        gpu=0.97,
        is_least=True,
    ),
    Goal(
        what="time of the dense step over that of diffusers' DiT, same size",
        script="train_step",
        value=lambda report: step_row(report)["dense_over_peer"],
        form="{:.2f}",
        cpu=0.95,
        gpu=0.8,
    ),
    Goal(
        what="XL/2 with batch 256: routed steps per second",
        script="train_step_batch_256",
        value=lambda report: 1 / min(row["routed_seconds"]["median"] for row in report["rows"]),
        form="{:.2f}",
        gpu=3.7,
        is_least=True,
    ),
    Goal(
        what="images/s of Sparse Guidance (0.5/0.9) over those of dense CFG, XL/2",
        script="sampling",
        value=guided_speedup,
        form="{:.2f}",
        cpu=2.25,
        gpu=2.2,
        is_least=True,
    ),
    Goal(
        what="training loop beyond the bare step, with checkpoints",
        script="training_loop",
        value=lambda report: max(row["overhead_with_checkpoints"] for row in report["rows"]),
        form="{:.1%}",
        cpu=0.03,
        gpu=0.02,
    ),
    Goal(
        what="`import diffusers_tread` beyond the import of diffusers' DiT, seconds",
        script="startup",
        value=lambda report: seconds_of(report, "import beyond the peer"),
        form="{:.2f}",
        cpu=0.15,
    ),
)


def goals_table(results: Path) -> str:
    """The goals and what the results say of them."""
    lines = ["| what | goal, 2 CPU cores | reached | goal, H200 in bfloat16 | reached |", "|---|---|---|---|---|"]
    for goal in GOALS:
        cells = [goal.what]
        for device, bound in (("cpu", goal.cpu), ("gpu", goal.gpu)):
            cells += ["-", "-"] if bound is None else reached(goal, bound, results / f"{goal.script}_{device}.json")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(goal: Goal, bound: float, path: Path) -> list[str]:
    wanted = f"{'≥' if goal.is_least else '≤'} {goal.form.format(bound)}"
    if not path.exists():
        return [wanted, "not measured"]
    value = goal.value(read(path))
    is_met = value >= bound if goal.is_least else value <= bound
    return [wanted, f"{goal.form.format(value)}, {'met' if is_met else 'missed'}"]


# --------------------------------------------------------------------------------------------------------------- plot


def plot(reports: list[dict[str, Any]], path: Path) -> None:
    """The speed-up of each row of training steps, with quartiles of its pairs, under a line at its FLOP ceiling."""
    from matplotlib.figure import Figure

    rows = [(row, report["settings"]) for report in reports for row in report["rows"]]
    devices = [report["hardware"]["accelerator"] or "CPU" for report in reports for _ in report["rows"]]
    colours = {device: f"C{index}" for index, device in enumerate(dict.fromkeys(devices))}
    figure = Figure(figsize=(1.5 + 1.3 * len(rows), 4), layout="constrained")
    axis = figure.subplots()
    for position, (row, _) in enumerate(rows):
        pairs = row["speedup_of_pairs"]
        spread = [
            [max(row["speedup"] - pairs["first_quartile"], 0)],
            [max(pairs["third_quartile"] - row["speedup"], 0)],
        ]
        device = devices[position]
        label = device if device not in devices[:position] else None
        axis.bar(position, row["speedup"], width=0.6, yerr=spread, capsize=4, color=colours[device], label=label)
        axis.hlines(row["flop_ceiling"], position - 0.4, position + 0.4, color="black")
    names = [
        f"{row['preset']}, {row['num_tokens']} x {row['batch_size']}\n{settings['dtype']}, {row['mode']}"
        + (f"\n{settings['matmul_precision']}" if settings["matmul_precision"] != "highest" else "")
        for row, settings in rows
    ]
    axis.legend(loc="upper left")
    axis.set_xticks(range(len(rows)), names)
    axis.set_ylabel("dense / routed step time (line: FLOP ceiling)")
    axis.set_ylim(bottom=1.0 if all(row["speedup"] > 1.0 for row, _ in rows) else 0.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
