# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Draws the predicted speed-up of routing against the number of GPUs, by scheme, batch and network.

    python benchmarks/scaling_plot.py --output docs/images/scaling.png

Other flags are those of `scaling.py`.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import scaling
from common import write_whole


NETWORKS = {50.0: "400 Gb/s for each GPU", 6.25: "400 Gb/s for eight GPUs"}
BATCHES = (
    ("128 per GPU", ["--study", "weak", "--batch_size", "128"], "-"),
    ("32 per GPU", ["--study", "weak", "--batch_size", "32"], "--"),
    ("256 in all", ["--study", "strong", "--total_batch_size", "256"], ":"),
)
COLOURS = {"ddp": "C0", "fsdp2": "C1", "hsdp": "C2"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("docs/images/scaling.png"), help="PNG file to write.")
    args, others = parser.parse_known_args(argv)
    write_whole(args.output, draw(others))


def curves(flags: list[str]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Rows by network and scheme."""
    args = scaling.parse_args([*flags, "--inter_node_gbps", ",".join(map(str, NETWORKS))])
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in scaling.study(scaling.make_model(args.presets[0], args), args.presets[0], args):
        found.setdefault((row["inter_node_gbps"], row["scheme"]), []).append(row)
    return found


def draw(flags: list[str]) -> bytes:
    """The picture as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = dict(zip(NETWORKS, figure.subplots(1, 2, sharey=True), strict=True))
    for _, study, style in BATCHES:
        for (network, scheme), rows in curves([*study, *flags]).items():
            gpus, speedups = [row["num_gpus"] for row in rows], [row["speedup"] for row in rows]
            axes[network].plot(gpus, speedups, style, color=COLOURS[scheme], marker=".", alpha=0.85)

    for network, axis in axes.items():
        axis.set_xscale("log", base=2)
        axis.set_xticks([2**power for power in range(11)], [f"{2**power:,}" for power in range(11)], fontsize=8)
        axis.set_title(f"{NETWORKS[network]} between nodes", fontsize=10)
        axis.set_xlabel("GPUs, eight in a node")
        axis.grid(alpha=0.3)
    first, second = axes.values()
    first.set_ylabel("predicted dense / routed step time")
    first.legend(handles=[Line2D([], [], color=colour, label=name.upper()) for name, colour in COLOURS.items()])
    second.legend(handles=[Line2D([], [], color="black", linestyle=style, label=name) for name, _, style in BATCHES])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
