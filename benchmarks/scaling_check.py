# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Measures one and two processes on a CPU (gloo, one thread each) beside what `scaling_model.py` predicts for them.

Measured separately are forward and backward, AdamW, and a step's collectives without the step. From these the model
predicts the steps of two processes, with nothing hidden (overlap 0) and with all but the last piece hidden (1). On a
CPU the processes that compute also send and add up, so little can be hidden.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import keep_freed_memory, latent_size, summary
from scaling_model import ADAMW_BYTES, KINDS, Cluster, Model, Plan, step
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusers_tread import EDMObjective, RoutingCall, TREADTransformer2DModel


FLOAT_BYTES = 4


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for DDP and one for FSDP2."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, args), nprocs=2)
        seconds = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    # Both start a turn together, and the slower one ends it.
    together = {name: list(map(max, *(times[name] for times in seconds))) for name in seconds[0]}
    medians = {name: statistics.median(times) for name, times in together.items()}
    with torch.device("meta"):
        model = make_model(args)
    return [compare(scheme, model, medians, together, args) for scheme in ("ddp", "fsdp2")]


# ---------------------------------------------------------------------------------------------------------- measuring


def make_model(args: argparse.Namespace) -> TREADTransformer2DModel:
    sample_size = latent_size(args.check_preset, args.tokens)
    return TREADTransformer2DModel.from_preset(args.check_preset, sample_size=sample_size)


def work(rank: int, folder: str, args: argparse.Namespace) -> None:
    """Writes the seconds of one of the two processes, by what was timed."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(args.seed)
    model, sharded = make_model(args), make_model(args)
    turns: dict[str, Callable[[], None]] = {}

    # One process, two that know nothing of each other, two with DDP and with FSDP2.
    bare, update = make_step(model, args, seed=rank)
    for kind in KINDS:
        turns[f"alone_{kind}"] = (lambda kind=kind: bare(kind)) if rank == 0 else lambda: None
        turns[f"apart_{kind}"] = lambda kind=kind: bare(kind)
    turns["update"] = update
    turns |= collectives(model, args)
    for block in sharded.transformer_blocks:
        fully_shard(block)
    wrapped = {"ddp": DistributedDataParallel(model, bucket_cap_mb=args.bucket_mib), "fsdp2": fully_shard(sharded)}
    for scheme, network in wrapped.items():
        forward_backward, update = make_step(network, args, seed=rank)

        def whole(kind: str, forward_backward=forward_backward, update=update) -> None:
            forward_backward(kind)
            update()

        turns |= {f"{scheme}_{kind}": lambda kind=kind, whole=whole: whole(kind) for kind in KINDS}

    torch.save(time_together(turns, args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def make_step(network: torch.nn.Module, args: argparse.Namespace, *, seed: int):
    """A forward and backward of "dense" or "routed", and an update."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(seed)
    side = latent_size(args.check_preset, args.tokens)
    latents = torch.randn(args.check_batch_size, 4, side, side, generator=generator)
    labels = torch.randint(0, 1000, (args.check_batch_size,), generator=generator)
    objective = EDMObjective()

    def forward_backward(kind: str) -> None:
        network.zero_grad()
        routing = RoutingCall(enabled=kind == "routed", seed=seed)
        objective.loss(network, latents, class_labels=labels, routing=routing).mean().backward()

    return forward_backward, optimizer.step


def collectives(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """DDP's and FSDP2's communication of a step, in as many pieces, without the step."""
    count = sum(weight.numel() for weight in model.parameters())
    buckets = math.ceil(count * FLOAT_BYTES / (args.bucket_mib * 2**20))
    bucket = torch.zeros(count // buckets)
    units = len(model.transformer_blocks) + 1
    whole, shard = torch.zeros(count // units // 2 * 2), torch.zeros(count // units // 2)

    def ddp() -> None:
        for _ in range(buckets):
            dist.all_reduce(bucket)

    def fsdp2() -> None:
        for _ in range(units):
            dist.all_gather_into_tensor(whole, shard)
            dist.all_gather_into_tensor(whole, shard)
            dist.reduce_scatter_tensor(shard, whole)

    return {"ddp_collectives": ddp, "fsdp2_collectives": fsdp2}


def time_together(turns: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of this process, in turns, each of which both processes begin together."""
    seconds = {name: [] for name in turns}
    for repeat in range(args.warmup + args.repeats):
        for name, turn in turns.items():
            dist.barrier()
            start = time.perf_counter()
            turn()
            if repeat >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# ---------------------------------------------------------------------------------------------------------- comparing


def compare(
    scheme: str,
    model: torch.nn.Module,
    medians: dict[str, float],
    times: dict[str, list[float]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Measured and predicted seconds of a step of two processes."""
    count = sum(weight.numel() for weight in model.parameters())
    reduced = {"ddp": 2, "fsdp2": 3}[
        scheme
    ]  # half-collectives of the whole model, (k - 1) / k = 1/2 of its bytes each
    bandwidth = reduced * count * FLOAT_BYTES / 2 / medians[f"{scheme}_collectives"]
    work = Model(
        num_parameters=count,
        num_blocks=len(model.transformer_blocks),
        seconds_per_image={kind: medians[f"apart_{kind}"] / args.check_batch_size for kind in KINDS},
        overhead=0.0,
    )
    cluster = Cluster(gpus_per_node=2, intra_bandwidth=bandwidth, latency=0.0)
    row = {
        "preset": args.check_preset,
        "batch_size": args.check_batch_size,
        "scheme": scheme,
        "bus_bandwidth": bandwidth,
        "collectives_seconds": summary(times[f"{scheme}_collectives"]),
        "update_seconds": summary(times["update"]),
    }
    for kind in KINDS:
        measured, bounds = medians[f"{scheme}_{kind}"], []
        for overlap in (0.0, 1.0):
            plan = Plan(
                scheme=scheme,
                overlap=overlap,
                fsdp_gradient_bytes=FLOAT_BYTES,
                fsdp_parameter_bytes=FLOAT_BYTES,
                bucket_bytes=args.bucket_mib * 2**20,
                ema=False,
                memory_bandwidth=ADAMW_BYTES * count / medians["update"],
                checkpoint_rate=math.inf,
                storage_rate=math.inf,
            )
            bounds.append(step(kind, 2, args.check_batch_size, work, plan, cluster).total)
        row |= {
            f"{kind}_alone_seconds": summary(times[f"alone_{kind}"]),
            f"{kind}_apart_seconds": summary(times[f"apart_{kind}"]),
            f"{kind}_measured_seconds": summary(times[f"{scheme}_{kind}"]),
            f"{kind}_predicted_seconds": bounds,
            f"{kind}_deviation": [measured / bound - 1 for bound in bounds],
        }
    row["speedup_alone"] = speedup(*(medians[f"alone_{kind}"] + medians["update"] for kind in KINDS))
    row["speedup_measured"] = speedup(*(medians[f"{scheme}_{kind}"] for kind in KINDS))
    pairs = zip(row["dense_predicted_seconds"], row["routed_predicted_seconds"], strict=True)
    row["speedup_predicted"] = [speedup(*pair) for pair in pairs]
    return row


def speedup(dense: float, routed: float) -> float:
    return dense / routed


def table(report: dict[str, Any]) -> str:
    """The report's rows as Markdown, medians."""
    columns = {
        "scheme, step": lambda row, kind: f"{row['scheme'].upper()}, {kind}",
        "one process, forward and backward, ms": lambda row, kind: milliseconds(row[f"{kind}_alone_seconds"]),
        "two that do not communicate, ms": lambda row, kind: milliseconds(row[f"{kind}_apart_seconds"]),
        "collectives apart, ms (bus bandwidth, GB/s)": lambda row, kind: (
            f"{milliseconds(row['collectives_seconds'])} ({row['bus_bandwidth'] / 1e9:.2f})"
        ),
        "predicted step, overlap 0 and 1, ms": lambda row, kind: ", ".join(
            f"{seconds * 1e3:.0f}" for seconds in row[f"{kind}_predicted_seconds"]
        ),
        "measured step, ms": lambda row, kind: milliseconds(row[f"{kind}_measured_seconds"]),
        "measured over predicted": lambda row, kind: ", ".join(f"{value:+.0%}" for value in row[f"{kind}_deviation"]),
        "speed-up: alone, predicted, measured": lambda row, kind: (
            f"{row['speedup_alone']:.2f}, {row['speedup_predicted'][0]:.2f} and {row['speedup_predicted'][1]:.2f}, "
            f"{row['speedup_measured']:.2f}"
        ),
    }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row, kind) for cell in columns.values()] for row in report["rows"] for kind in KINDS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median'] * 1e3:,.0f}"
