# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Shuffled reads of stored latents: formats side by side, then the loader that training uses.

    python benchmarks/read_latents.py --output benchmarks/results/read_latents_cpu.json

Records are 8x32x32 float16, mean and standard deviation of four channels: 16 KiB. One thread reads each format in
batches of random records. Three things are measured of the loader (`make_batches`): its samples/s when nothing is done
with them; the share of time that a consumer with a given rate of samples/s, such as a GPU, waits for it; and the
memory that the process and its workers gain over an epoch, without copies of files.

The data are read just after they were written, so unless they are larger than the memory they come from the page
cache: the disk is not measured.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from common import hardware, start_report, summary, versions, write_whole
from latent_formats import FORMATS, NUM_CLASSES, SEQUENTIAL

from diffusers_tread.data import make_batches, open_latents


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--num_samples", type=int, default=8192, help="Records.")
    add("--latent_size", type=int, default=32, help="Side of the latents.")
    add("--batch_size", type=int, default=256, help="Records per batch.")
    add("--formats", default=",".join(name.replace(", ", "-") for name in FORMATS), help="Separated by commas.")
    add("--num_workers", default="0,2", help="Of the loader, separated by commas.")
    add("--repeats", type=int, default=5, help="Measurements of each rate.")
    add("--seconds", type=float, default=0.5, help="Length of a measurement.")
    add("--consumer_rate", type=float, default=3000, help="Samples/s of the simulated consumer.")
    add("--consumer_steps", type=int, default=40, help="Batches it takes.")
    add("--folder", type=Path, help="Where to write the data, on the disk to be measured; by default temporary files.")
    add("--seed", type=int, default=0, help="Of values and order.")
    add("--output", type=Path, help="JSON file to write; by default none.")
    args = parser.parse_args(argv)

    names = {name.replace(", ", "-"): name for name in FORMATS}
    if unknown := sorted(set(args.formats.split(",")) - set(names)):
        raise ValueError(f"Expected --formats among {list(names)}, got {unknown}.")
    args.formats = [names[name] for name in args.formats.split(",")]
    args.num_workers = [int(value) for value in args.num_workers.split(",")]
    if args.repeats < 2 or args.num_samples < args.batch_size or args.seconds <= 0:
        raise ValueError(
            f"Expected --repeats >= 2, --num_samples >= --batch_size and --seconds > 0, got {args.repeats}, "
            f"{args.num_samples}, {args.batch_size} and {args.seconds}."
        )
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("read_latents.py", argv)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    # Random values, which are hard to compress, as latents are.
    moments = rng.random((args.num_samples, 8 * args.latent_size**2), dtype=np.float32).astype(np.float16) - 0.5
    labels = rng.integers(0, NUM_CLASSES, args.num_samples)

    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        rows = measure_formats(Path(root), moments, labels, args)
        print("format             samples/s  MB on disk")
        for row in rows:
            print(f"{row['format']:16} {row['samples_per_second']['median']:11,.0f} {row['bytes'] / 1e6:11,.1f}")

        FORMATS["arrow"][0](Path(root, "latents"), moments, labels)
        print("loader                samples/s  waiting  memory gained")
        loaders = []
        for streaming in (False, True):
            for num_workers in args.num_workers:
                loaders.append(measure_loader(Path(root, "latents"), streaming, num_workers, args))
                print(format_loader(loaders[-1]), flush=True)

    report |= {
        "hardware": hardware("cpu"),
        "versions": versions() | {"datasets": datasets.__version__, "pyarrow": pyarrow.__version__},
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "folder")},
        "formats": rows,
        "loaders": loaders,
    }
    if args.output is not None:
        write_whole(args.output, (json.dumps(report, indent=2) + "\n").encode())
    return report


def measure_formats(root: Path, moments: np.ndarray, labels: np.ndarray, args) -> list[dict[str, Any]]:
    """A row for each format: shuffled reads, in turns, after a check that they give back what was written."""
    rng = np.random.default_rng(args.seed)

    def draw() -> np.ndarray:
        return rng.choice(args.num_samples, args.batch_size, replace=False)

    reads, rows = {}, []
    for number, name in enumerate(args.formats):
        write, open_ = FORMATS[name]
        folder, indices = root / str(number), draw()
        folder.mkdir()
        write(folder, moments, labels)
        reads[name] = open_(folder)
        values, classes = reads[name](indices)
        is_right = np.array_equal(values, moments[indices]) and np.array_equal(classes, labels[indices])
        if name not in SEQUENTIAL and not is_right:
            raise RuntimeError(f"{name} gives other records than were written.")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        order = "through a buffer of 1000" if name in SEQUENTIAL else "random"
        rows.append({"format": name, "bytes": size, "order": order})

    # In turns, so that a change of the machine's speed meets all.
    rates = {name: [] for name in reads}
    for _ in range(args.repeats):
        for name, read in reads.items():
            rates[name].append(rate(lambda read=read: read(draw()), args))
    return [row | {"samples_per_second": summary(rates[row["format"]])} for row in rows]


def measure_loader(folder: Path, streaming: bool, num_workers: int, args) -> dict[str, Any]:
    """One row: what `make_batches` gives, how long a consumer waits for it, and what memory it gains in an epoch."""
    dataset = open_latents(folder, streaming=streaming)
    batches = make_batches(dataset, batch_size=args.batch_size, seed=args.seed, num_workers=num_workers)
    for _ in range(4):
        next(batches)
    rates = [rate(lambda: next(batches), args) for _ in range(args.repeats)]

    # A consumer that is busy elsewhere, as with a GPU, between one batch and the next.
    waits, start = [], time.perf_counter()
    for _ in range(args.consumer_steps):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(args.batch_size / args.consumer_rate)
    share = sum(waits) / (time.perf_counter() - start)

    # An epoch.
    before = peak = anonymous_memory()
    for _ in range(-(-args.num_samples // args.batch_size)):
        next(batches)
        peak = max(peak, anonymous_memory())
    return {
        "streaming": streaming,
        "num_workers": num_workers,
        "samples_per_second": summary(rates),
        "waiting_share": share,
        "longest_wait_seconds": max(waits),
        "median_wait_seconds": statistics.median(waits),
        "anonymous_bytes_before": before,
        "anonymous_bytes_gained_in_an_epoch": peak - before,
        "epoch_bytes": args.num_samples * 16 * args.latent_size**2,
    }


def rate(step, args: argparse.Namespace) -> float:
    """Samples/s over at least `--seconds`."""
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < args.seconds:
        step()
        steps += 1
    return steps * args.batch_size / elapsed


def anonymous_memory() -> int:
    """Bytes of this process and its workers that are no copies of files."""
    total = 0
    for process in (None, *multiprocessing.active_children()):
        status = Path("/proc", "self" if process is None else str(process.pid), "status").read_text()
        total += int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
    return total


def format_loader(row: dict[str, Any]) -> str:
    kind = f"{'stream' if row['streaming'] else 'disk'}, {row['num_workers']} workers"
    return (
        f"{kind:18} {row['samples_per_second']['median']:12,.0f} {row['waiting_share']:8.2%} "
        f"{row['anonymous_bytes_gained_in_an_epoch'] / 1e6:8.1f} MB of {row['epoch_bytes'] / 1e6:,.0f}"
    )


def table(report: dict[str, Any]) -> str:
    """Formats and loaders as Markdown, medians."""
    lines = ["| format | samples/s | MB on disk | order |", "|---|---|---|---|"]
    for row in report["formats"]:
        rate = row["samples_per_second"]["median"]
        lines.append(f"| {row['format']} | {rate:,.0f} | {row['bytes'] / 1e6:,.0f} | {row['order']} |")
    consumer = report["settings"]["consumer_rate"]
    lines += ["", f"| loader | samples/s | waiting at {consumer:,.0f} samples/s | MB gained in an epoch |"]
    lines.append("|---|---|---|---|")
    for row in report["loaders"]:
        kind = f"{'streamed' if row['streaming'] else 'memory-mapped'}, {row['num_workers']} workers"
        gained = f"{row['anonymous_bytes_gained_in_an_epoch'] / 1e6:,.0f} of {row['epoch_bytes'] / 1e6:,.0f}"
        rate = row["samples_per_second"]["median"]
        lines.append(f"| {kind} | {rate:,.0f} | {row['waiting_share']:.1%} | {gained} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
