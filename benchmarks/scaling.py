# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Predicts the training step on 1 to 1,024 GPUs, dense and routed, under DDP, FSDP2 and HSDP.

    python benchmarks/scaling.py                                         # 128 images per GPU
    python benchmarks/scaling.py --study strong --total_batch_size 256   # TREAD's batch, shared by all
    python benchmarks/scaling.py --study smallest --inter_node_gbps 50,6.25
    python benchmarks/scaling.py --check --output benchmarks/results/scaling_cpu.json

The compute is what `train_step.py` measured on one GPU, or FLOPs over a rate; the rest is arithmetic with the formulas
of `scaling_model.py`. No cluster was measured. --check compares with one and two processes measured on this CPU.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import scaling_check
import torch
from common import finish_report, latent_size, make_parser, set_up, start_report
from scaling_model import ADAMW_BYTES, KINDS, SCHEMES, Cluster, Model, Plan, gain_kept, smallest_batch, step

from diffusers_tread import TREADTransformer2DModel
from diffusers_tread.flops import training_flops


RESULTS = Path(__file__).parent / "results"
MEASURED = "train_step_gpu,train_step_batch_256_gpu,train_step_base_gpu,train_step_long_gpu"
GPUS = ",".join(str(2**power) for power in range(11))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7, warmup=2)
    add = parser.add_argument
    add("--check", action="store_true", help="Measure one and two processes here instead, and compare.")
    add("--check_preset", default="S/2", help="Size of the model of --check.")
    add("--check_batch_size", type=int, default=1, help="Images per process of --check.")

    # What is asked.
    add("--study", choices=("weak", "strong", "smallest"), default="weak", help="Fixed per GPU, in all, or sought.")
    add("--gpus", default=GPUS, help="Numbers of GPUs, separated by commas.")
    add("--batch_size", type=int, default=128, help="Images per GPU and optimiser step, of --study weak.")
    add("--total_batch_size", type=int, default=256, help="Images per optimiser step, of --study strong.")
    add("--keep", type=float, default=0.95, help="Share of the gain that --study smallest asks for.")
    add("--reference_batch_size", type=int, default=256, help="Images on one GPU whose gain is 100 %%.")
    add("--schemes", default=",".join(SCHEMES), help="Some of ddp, fsdp2, hsdp, by commas.")

    # The model and one GPU.
    add("--presets", default="XL/2", help="Sizes, by commas.")
    add("--tokens", type=int, default=256, help="Per image, a square number.")
    add("--selection_ratio", type=float, default=0.5, help="Share of tokens routed away, where FLOPs are counted.")
    add("--measured", default=MEASURED, help="Results of train_step.py to take a step's time from, '' for none.")
    add("--dense_ms", type=float, help="Instead: milliseconds of your own dense step ...")
    add("--routed_ms", type=float, help="... and of the routed one, one GPU with --batch_size images.")
    add(
        "--tflops", type=float, default=450, help="Rate for sizes that were not measured; XL/2 has it from 128 to 256."
    )
    add("--block_overhead_ms", type=float, default=0.32, help="Per block and step, whatever the batch; XL/2's.")
    add("--memory_gbps", type=float, default=4300, help="Of the GPU's memory; 90 %% of the H200's 4.8 TB/s.")

    # The links, GB/s and direction of one GPU.
    add("--gpus_per_node", type=int, default=8, help="GPUs that share NVLink.")
    add("--intra_node_gbps", type=float, default=450, help="In the node; NVLink 4.")
    add("--inter_node_gbps", default="50", help="Between nodes, per GPU, by commas; 50 is 400 Gb/s for each GPU.")
    add("--latency_us", type=float, default=10, help="Per level of a tree and collective.")

    # How it is trained.
    add("--overlap", default="1", help="Share of the compute that may hide communication, in [0, 1], by commas.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Forwards that share the images of a step.")
    add("--ddp_gradient_bytes", type=float, default=4, help="Per parameter; 2 for a hook that compresses to bfloat16.")
    add("--fsdp_gradient_bytes", type=float, default=2, help="Per parameter; bfloat16.")
    add("--fsdp_parameter_bytes", type=float, default=2, help="Per parameter; bfloat16.")
    add("--bucket_mib", type=float, default=25, help="DDP's bucket.")
    add("--reshard_after_forward", action=argparse.BooleanOptionalAction, default=True, help="FSDP's and HSDP's.")
    add("--use_ema", action=argparse.BooleanOptionalAction, default=True, help="Average the weights.")
    add("--checkpointing_steps", type=int, default=10_000, help="Steps between checkpoints; the recipes'.")
    add("--checkpoint_gbps", type=float, default=0.3, help="At which they are saved; training_loop.py's, on a CPU.")
    add("--image_kib", type=float, default=16, help="Read per image; a latent's mean and deviation in float16.")
    add("--storage_gbps", type=float, default=1, help="At which a node reads data.")
    args = parser.parse_args(argv)
    set_up(args)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Turns what was separated by commas into lists.

    Raises:
        ValueError: A flag out of range.
    """
    args.schemes, args.presets = args.schemes.split(","), args.presets.split(",")
    args.gpus = [int(value) for value in args.gpus.split(",")]
    args.overlap, args.inter_node_gbps = (
        [float(value) for value in values.split(",")] for values in (args.overlap, args.inter_node_gbps)
    )
    if unknown := sorted(set(args.schemes) - set(SCHEMES)):
        raise ValueError(f"Expected --schemes among {list(SCHEMES)}, got {unknown}.")
    if not all(0 <= value <= 1 for value in args.overlap):
        raise ValueError(f"Expected --overlap in [0, 1], got {args.overlap}.")
    if not 0 < args.keep <= 1:
        raise ValueError(f"Expected --keep in (0, 1], got {args.keep}.")
    if (args.dense_ms is None) != (args.routed_ms is None):
        raise ValueError("Expected both of --dense_ms and --routed_ms, got one of them.")
    signless = ("selection_ratio", "block_overhead_ms", "latency_us", "image_kib")
    numbers = {name: value for name, value in vars(args).items() if type(value) in (int, float) and name != "seed"}
    for name, value in numbers.items():
        if value < 0 or (value == 0 and name not in (*signless, "warmup")):
            raise ValueError(f"Expected a positive --{name}, got {value}.")
    if min(args.inter_node_gbps) <= 0:
        raise ValueError(f"Expected a positive --inter_node_gbps, got {args.inter_node_gbps}.")
    latent_size(args.presets[0], args.tokens)  # raises for a wrong number


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Predicts, or checks; returns what it writes."""
    args = parse_args(argv)
    report = start_report("scaling.py", argv)
    if args.check:
        rows = scaling_check.measure(args)
    else:
        rows = [row for preset in args.presets for row in study(make_model(preset, args), preset, args)]
    report = finish_report(report, args, rows=rows)
    print(table(report))
    return report


# ------------------------------------------------------------------------------------------------------------- inputs


def make_model(preset: str, args: argparse.Namespace) -> Model:
    """One GPU's work, by the first of: --dense_ms and --routed_ms, the files of --measured, FLOPs over --tflops."""
    with torch.device("meta"):
        model = TREADTransformer2DModel.from_preset(preset, sample_size=latent_size(preset, args.tokens))
    num_parameters, num_blocks = sum(weight.numel() for weight in model.parameters()), len(model.transformer_blocks)
    overhead = num_blocks * args.block_overhead_ms / 1e3
    fixed = overhead + ADAMW_BYTES * num_parameters / (args.memory_gbps * 1e9)

    if args.dense_ms is not None:
        measured = {"dense": args.dense_ms / 1e3, "routed": args.routed_ms / 1e3, "batch_size": args.batch_size}
    else:
        measured = read_step(preset, args)
    if measured is not None:
        seconds = {kind: (measured[kind] - fixed) / measured["batch_size"] for kind in KINDS}
    else:
        ratios = {"dense": 0.0, "routed": args.selection_ratio}
        rate = args.tflops * 1e12
        seconds = {kind: training_flops(model, selection_ratio=ratios[kind]) / rate for kind in KINDS}
    if min(seconds.values()) <= 0:
        raise ValueError(f"Expected a step longer than {fixed * 1e3:.1f} ms, its fixed part. See --block_overhead_ms.")
    return Model(num_parameters=num_parameters, num_blocks=num_blocks, seconds_per_image=seconds, overhead=overhead)


def read_step(preset: str, args: argparse.Namespace) -> dict[str, float] | None:
    """Medians of the largest batch that was measured with compiled blocks, or None."""
    found = []
    for name in filter(None, args.measured.split(",")):
        rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        wanted = (preset, args.tokens, "blocks")
        found += [row for row in rows if (row["preset"], row["num_tokens"], row["mode"]) == wanted]
    if not found:
        return None
    row = max(found, key=lambda row: row["batch_size"])
    return {kind: row[f"{kind}_seconds"]["median"] for kind in KINDS} | {"batch_size": row["batch_size"]}


def setups(args: argparse.Namespace):
    """Plan and cluster of every scheme, network and overlap that was asked for, with what tells them apart."""
    for inter, overlap, scheme in itertools.product(args.inter_node_gbps, args.overlap, args.schemes):
        cluster = Cluster(
            gpus_per_node=args.gpus_per_node,
            intra_bandwidth=args.intra_node_gbps * 1e9,
            inter_bandwidth=inter * 1e9,
            latency=args.latency_us / 1e6,
        )
        plan = Plan(
            scheme=scheme,
            overlap=overlap,
            accumulation=args.gradient_accumulation_steps,
            ddp_gradient_bytes=args.ddp_gradient_bytes,
            fsdp_gradient_bytes=args.fsdp_gradient_bytes,
            fsdp_parameter_bytes=args.fsdp_parameter_bytes,
            reshard_after_forward=args.reshard_after_forward,
            bucket_bytes=args.bucket_mib * 2**20,
            ema=args.use_ema,
            memory_bandwidth=args.memory_gbps * 1e9,
            checkpointing_steps=args.checkpointing_steps,
            checkpoint_rate=args.checkpoint_gbps * 1e9,
            image_bytes=args.image_kib * 2**10,
            storage_rate=args.storage_gbps * 1e9,
        )
        yield {"inter_node_gbps": inter, "overlap": overlap, "scheme": scheme}, plan, cluster


# -------------------------------------------------------------------------------------------------------------- study


def study(model: Model, preset: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for a preset."""
    rows = []
    for names, plan, cluster in setups(args):
        names = {"preset": preset} | names
        if args.study == "smallest":
            counts = [sought(num_gpus, model, plan, cluster, args) for num_gpus in args.gpus]
            rows.append(names | {"smallest": dict(zip(map(str, args.gpus), counts, strict=True))})
            continue
        total = args.total_batch_size
        for num_gpus in args.gpus:
            batch_size = args.batch_size if args.study == "weak" else total // num_gpus
            if args.study == "weak" or total % num_gpus == 0:
                rows.append(names | predicted(num_gpus, batch_size, model, plan, cluster, args))
    return rows


def sought(num_gpus: int, model: Model, plan: Plan, cluster: Cluster, args: argparse.Namespace) -> dict[str, Any]:
    """The smallest batch per GPU that keeps the gain of one GPU with that batch, and with the reference batch."""
    references = {"of_same_batch": None, "of_reference": args.reference_batch_size}
    return {
        name: smallest_batch(num_gpus, args.keep, reference, model, plan, cluster)
        for name, reference in references.items()
    }


def predicted(
    num_gpus: int, batch_size: int, model: Model, plan: Plan, cluster: Cluster, args: argparse.Namespace
) -> dict[str, Any]:
    """The steps on so many GPUs, and how they compare with one GPU's with the reference batch."""
    reference = args.reference_batch_size
    row = {"num_gpus": num_gpus, "batch_size": batch_size}
    for kind in KINDS:
        parts = step(kind, num_gpus, batch_size, model, plan, cluster)
        alone = step(kind, 1, batch_size if args.study == "weak" else args.total_batch_size, model, plan, cluster)
        images = 1 if args.study == "strong" else num_gpus  # of `alone`'s, that the GPUs do in a step
        row |= {
            f"{kind}_seconds": parts.total,
            f"{kind}_parts": vars(parts),
            f"{kind}_exposed_share": parts.exposed / parts.total,
            f"{kind}_images_per_second": num_gpus * batch_size / parts.total,
            f"{kind}_efficiency": images * alone.total / (num_gpus * parts.total),
        }
    row["speedup"] = row["dense_seconds"] / row["routed_seconds"]
    row["gain_kept"] = gain_kept(num_gpus, batch_size, reference, model, plan, cluster)
    return row


# ---------------------------------------------------------------------------------------------------------- reporting


def table(report: dict[str, Any]) -> str:
    """The report's rows as Markdown."""
    settings, rows = report["settings"], report["rows"]
    if settings["check"]:
        return scaling_check.table(report)
    columns = {
        "model": (settings["presets"], lambda row: row["preset"]),
        "GB/s across nodes": (settings["inter_node_gbps"], lambda row: f"{row['inter_node_gbps']:g}"),
        "overlap": (settings["overlap"], lambda row: f"{row['overlap']:g}"),
    }
    columns = {name: cell for name, (values, cell) in columns.items() if len(values) > 1}
    columns["scheme"] = lambda row: row["scheme"].upper()
    if settings["study"] == "smallest":
        for count in settings["gpus"]:
            columns[f"{count:,} GPU{'s' * (count > 1)}"] = lambda row, count=str(count): " / ".join(
                "-" if value is None else str(value) for value in row["smallest"][count].values()
            )
    else:
        columns |= {
            "GPUs": lambda row: f"{row['num_gpus']:,}",
            "images per GPU": lambda row: f"{row['batch_size']:,}",
            "step, ms, dense → routed": lambda row: (
                f"{row['dense_seconds'] * 1e3:.1f} → {row['routed_seconds'] * 1e3:.1f}"
            ),
            "exposed communication": lambda row: (
                f"{row['dense_exposed_share']:.0%} → {row['routed_exposed_share']:.0%}"
            ),
            "speed-up": lambda row: f"{row['speedup']:.2f}",
            "gain kept": lambda row: f"{row['gain_kept']:.0%}",
            "images/s, routed": lambda row: f"{row['routed_images_per_second']:,.0f}",
            "efficiency": lambda row: f"{row['dense_efficiency']:.0%} → {row['routed_efficiency']:.0%}",
        }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
