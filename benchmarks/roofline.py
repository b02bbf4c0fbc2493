# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Predicts the time of a training step on a GPU from its FLOPs and bytes: no GPU is needed, nothing is measured.

    python benchmarks/roofline.py --output benchmarks/results/roofline_gpu.json \\
        --measured benchmarks/results/train_step_gpu.json,benchmarks/results/profile_step_gpu.json

A step (forward, backward, AdamW) runs on tensors that have shapes but no values, and every operator is recorded with
its FLOPs and the bytes that it reads and writes. An operator takes the longer of FLOPs / rate and bytes / bandwidth;
the rates are what an H200 reached on large products and copies. A step is predicted in two ways:

- eager: each operator reads its inputs from memory and writes its outputs to it. Views cost nothing.
- fused: elementwise operators, norms and reductions with equally many products, attentions and moves of tokens before
  them (on the longest way) are one kernel: it reads once what comes from outside and writes what is used outside.

Both are lower bounds: no launches, nothing computed twice, every kernel as fast as the largest product. Attention
is a fused kernel in both; its backward has five products, one of them the forward's again.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, finish_report, latent_size, start_report
from roofline_operators import Operator, Recorder
from torch._subclasses import FakeTensorMode

from diffusers_tread import RoutingCall, TREADTransformer2DModel


# Kernel classes, and which kinds of profile_step.py are theirs. A compiled model casts its weights in fused kernels.
CLASSES = {
    "linear layers": ("linear layers",),
    "attention": ("attention",),
    "elementwise and norms": ("fused kernels", "activation", "layer norm", "sums, products, copies"),
    "casts of weights": (),
    "moving tokens": ("moving tokens",),
    "optimiser": ("optimiser",),
}
TENSORS_OF_ADAMW = 7  # read: weight, gradient, two averages; written: weight, two averages


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="XL/2", help="Size of the model.")
    add("--tokens", type=int, default=256, help="Tokens per image, a square number.")
    add("--batch_size", type=int, default=128, help="Images per step.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, on the default route.")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="Below float32 by autocast; weights stay float32.")
    add("--matmul_tflops", type=float, default=790.0, help="TFLOP/s that a GPU reaches on large products.")
    add("--bandwidth_tbs", type=float, default=4.3, help="TB/s that it reaches on large copies.")
    add("--measured", default="", help="Reports of train_step.py and profile_step.py to compare with, by commas.")
    add("--output", type=Path, help="JSON file to write; by default none.")
    args = parser.parse_args(argv)
    args.device = "cpu"  # where it is counted
    latent_size(args.preset, args.tokens)  # raises for a wrong number
    if args.batch_size < 1 or not 0.0 < args.selection_ratio < 1.0:
        given = f"{args.batch_size} and {args.selection_ratio}"
        raise ValueError(f"Expected --batch_size >= 1 and --selection_ratio in (0, 1), got {given}.")
    if not (args.matmul_tflops > 0 and args.bandwidth_tbs > 0):
        given = f"{args.matmul_tflops} and {args.bandwidth_tbs}"
        raise ValueError(f"Expected --matmul_tflops > 0 and --bandwidth_tbs > 0, got {given}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the prediction; returns what it writes."""
    args = parse_args(argv)
    report = start_report("roofline.py", argv)
    measured = read_measured([Path(name) for name in args.measured.split(",") if name], args)
    steps = {"dense": count_step(args, 0.0), "routed": count_step(args, args.selection_ratio)}
    rows = []
    for name in CLASSES:
        parts = {kind: [one for one in operators if one.kind == name] for kind, operators in steps.items()}
        rows.append({"class": name} | {kind: totals(operators, args) for kind, operators in parts.items()})
    report = finish_report(
        report,
        args,
        is_prediction=True,
        rows=rows,
        steps={kind: totals(operators, args) for kind, operators in steps.items()},
        same_in_both=totals(same_in_both(steps["dense"], steps["routed"]), args),
        measured=measured,
    )
    print(table(report))
    return report


def count_step(args: argparse.Namespace, selection_ratio: float) -> list[Operator]:
    """The operators of one training step, whose loss is a mean squared error."""
    with FakeTensorMode():
        side = latent_size(args.preset, args.tokens)
        model = TREADTransformer2DModel.from_preset(args.preset, sample_size=side).train()
        latents, target = torch.randn(2, args.batch_size, model.config.in_channels, side, side)
        timestep, labels = torch.rand(args.batch_size), torch.zeros(args.batch_size, dtype=torch.int64)
        routing = RoutingCall(enabled=selection_ratio > 0, selection_ratio=selection_ratio, seed=0)
        with Recorder(parameter.shape for parameter in model.parameters()) as recorder:
            with torch.autocast("cpu", DTYPES[args.dtype], enabled=args.dtype != "float32"):
                prediction = model(latents, timestep, labels, routing=routing).sample
                loss = (prediction.float() - target).square().mean()
            loss.backward()
        num_bytes = sum(TENSORS_OF_ADAMW * parameter.nbytes for parameter in model.parameters())
    adamw = Operator(name="adamw", kind="optimiser", flops=0, bytes=num_bytes, fused_bytes=num_bytes)
    return [*recorder.operators(), adamw]


# ---------------------------------------------------------------------------------------------------------- predicting


def seconds(operator: Operator, args: argparse.Namespace, *, fused: bool) -> float:
    num_bytes = operator.fused_bytes if fused else operator.bytes
    return max(operator.flops / (args.matmul_tflops * 1e12), num_bytes / (args.bandwidth_tbs * 1e12))


def totals(operators: list[Operator], args: argparse.Namespace) -> dict[str, float]:
    """Of operators, one after the other."""
    return {
        "flops": sum(one.flops for one in operators),
        "eager_bytes": sum(one.bytes for one in operators),
        "fused_bytes": sum(one.fused_bytes for one in operators),
        "eager_seconds": sum(seconds(one, args, fused=False) for one in operators),
        "fused_seconds": sum(seconds(one, args, fused=True) for one in operators),
    }


def same_in_both(dense: list[Operator], routed: list[Operator]) -> list[Operator]:
    """The operators of the dense step that the routed one has with the same sizes."""
    left, same = Counter(routed), []
    for operator in dense:
        if left[operator]:
            left[operator] -= 1
            same.append(operator)
    return same


def read_measured(paths: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps ("eager", "fused": compiled blocks) and of kernel classes, from reports of other scripts.

    Raises:
        ValueError: A report that has no row of the preset, tokens, batch size and dtype that are predicted.
    """
    sizes = {"preset": args.preset, "num_tokens": args.tokens, "batch_size": args.batch_size, "dtype": args.dtype}
    measured: dict[str, Any] = {"steps": {}, "classes": {}}
    for path in paths:
        report = json.loads(path.read_text(encoding="utf-8"))
        settings = report["settings"] | {"num_tokens": report["settings"]["tokens"]}
        rows = [row for row in report["rows"] if sizes.items() <= (settings | row).items()]
        if not rows:
            raise ValueError(f"Expected rows of {sizes} in {path}, a report of train_step.py or profile_step.py.")
        for row in rows:
            if "kind" in row:
                names = [name for name, kinds in CLASSES.items() if row["kind"] in kinds]
                one = measured["classes"].setdefault(names[0] if names else row["kind"], {"dense": 0.0, "routed": 0.0})
                for kind in one:
                    one[kind] += row[f"{kind}_seconds"]
            else:
                times = {kind: row[f"{kind}_seconds"]["median"] for kind in ("dense", "routed")}
                measured["steps"]["eager" if row["mode"] == "eager" else "fused"] = times
    return measured


# ---------------------------------------------------------------------------------------------------------- reporting


def table(report: dict[str, Any]) -> str:
    """Two tables as Markdown: kernel classes, and steps."""
    return f"{class_table(report)}\n\n{step_table(report)}"


def class_table(report: dict[str, Any]) -> str:
    settings, measured = report["settings"], report["measured"]["classes"]
    title = f"{settings['preset']}, {settings['tokens']} tokens x {settings['batch_size']}, {settings['dtype']}"
    columns = [f"predicted: {title}"]
    for kind in ("dense", "routed"):
        columns += [f"{kind}: TFLOP", "GB, eager", "fused", "ms, eager", "fused", "measured"]
    lines = [columns, ["---"] * len(columns)]
    for row in report["rows"]:
        cells = [row["class"]]
        for kind in ("dense", "routed"):
            one = row[kind]
            cells += [f"{one['flops'] / 1e12:.2f}", f"{one['eager_bytes'] / 1e9:,.1f}"]
            cells += [f"{one['fused_bytes'] / 1e9:,.1f}"]
            cells += [f"{1e3 * one[f'{how}_seconds']:.1f}" for how in ("eager", "fused")]
            cells += [milliseconds(measured.get(row["class"]), kind)]
        lines.append(cells)
    known = {row["class"] for row in report["rows"]}
    for name, times in measured.items():
        if name not in known:
            lines.append([name, *["-"] * 5, milliseconds(times, "dense"), *["-"] * 5, milliseconds(times, "routed")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(report: dict[str, Any]) -> str:
    lines = [
        "| step | dense, ms | measured | routed, ms | measured | dense over routed | measured | not shortened |",
        "|---" * 8 + "|",
    ]
    for how in ("eager", "fused"):
        times = {kind: report["steps"][kind][f"{how}_seconds"] for kind in ("dense", "routed")}
        measured = report["measured"]["steps"].get(how)
        ratio = "-" if measured is None else f"{measured['dense'] / measured['routed']:.2f}"
        same = report["same_in_both"][f"{how}_seconds"] / times["dense"]
        lines.append(
            f"| {how} | {milliseconds(times, 'dense')} | {milliseconds(measured, 'dense')} | "
            f"{milliseconds(times, 'routed')} | {milliseconds(measured, 'routed')} | "
            f"{times['dense'] / times['routed']:.2f} | {ratio} | {same:.1%} |"
        )
    return "\n".join(lines)


def milliseconds(times: dict[str, float] | None, kind: str) -> str:
    return "-" if times is None else f"{1e3 * times[kind]:.1f}"


if __name__ == "__main__":
    main()
