# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: their flags, timing in turns, and the report that says what was measured where."""

import argparse
import ctypes
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffusers_tread


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_parser(description: str, *, repeats: int, warmup: int) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark of the speed has."""
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, mps, ...")
    add("--threads", type=int, help="Threads on the CPU; by default torch's choice.")
    add("--repeats", type=int, default=repeats, help="Measurements of each kind.")
    add("--warmup", type=int, default=warmup, help="Of each kind before, not counted.")
    add("--seed", type=int, default=0, help="Of weights, data and subsets.")
    add("--output", type=Path, help="JSON file to write; by default none.")
    return parser


def set_up(args: argparse.Namespace) -> None:
    """Checks the flags of `make_parser`, sets the threads, and has glibc keep what is freed.

    Raises:
        ValueError: A flag out of range.
    """
    if args.repeats < 2 or args.warmup < 0:
        raise ValueError(f"Expected --repeats >= 2 and --warmup >= 0, got {args.repeats} and {args.warmup}.")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"Expected --threads >= 1, got {args.threads}.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Has glibc give no memory back to the system, as torch does on GPUs; False where there is no glibc.

    Else tensors get new pages again and again, the more of them the more the heap is in pieces: what is timed would
    depend on what lies there from before.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def latent_size(preset: str, num_tokens: int) -> int:
    """The side of latents that are so many tokens for a preset such as "XL/2".

    Raises:
        ValueError: No square number of tokens.
    """
    if num_tokens < 1 or math.isqrt(num_tokens) ** 2 != num_tokens:
        raise ValueError(f"Expected square numbers for --tokens, such as 256 or 1024, got {num_tokens}.")
    return math.isqrt(num_tokens) * int(preset.split("/")[-1])


def time_in_turns(
    steps: Mapping[str, Callable[[], Any]], args: argparse.Namespace, *, repeats: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each step, `args.repeats` times each, one after the other, so that a drift of the machine meets all.

    Args:
        steps: Name to what is timed, until the device has done it.
        args: Of `make_parser`.
        repeats: Instead of `args.repeats`.
    """
    repeats = args.repeats if repeats is None else repeats
    seconds = {name: [] for name in steps}
    for repeat in range(args.warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.device(args.device).type != "cpu":
                torch.accelerator.synchronize()
            if repeat >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "first_quartile": low, "third_quartile": high, "min": min(values), "max": max(values)}


def start_report(script: str, argv: list[str] | None) -> dict[str, Any]:
    """The first entries of a report, taken before work starts: the commit may change while a benchmark runs.

    Args:
        script: Name of the file in benchmarks/.
        argv: As given to `main`; None for those of the command line.
    """
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *(sys.argv[1:] if argv is None else argv)]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": source_state(),
    }


def finish_report(report: dict[str, Any], args: argparse.Namespace, **results: Any) -> dict[str, Any]:
    """Adds hardware, versions, settings and results, and writes the file that was asked for."""
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "plot")}
    report |= {"hardware": hardware(args.device), "versions": versions(), "settings": settings, **results}
    if args.output is not None:
        write_whole(args.output, (json.dumps(report, indent=2) + "\n").encode())
    return report


def hardware(device: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    is_cuda = torch.device(device).type == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": device,
        "accelerator": torch.cuda.get_device_name(device) if is_cuda else None,
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip() if is_cuda else None,
    }


def versions() -> dict[str, str]:
    packages = {"torch": torch, "diffusers": diffusers, "diffusers_tread": diffusers_tread}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in packages.items()}


def source_state() -> dict[str, Any]:
    """The commit, and whether code (not results, not documents) differs from it.

    A copy of a checkout may know an older commit, or none: there COMMIT in the environment names the one that is run.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    code = (":/src", ":/examples", ":/benchmarks/*.py")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    if commit := os.environ.get("COMMIT"):
        return {"commit": commit, "dirty": False}
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def write_whole(path: Path, content: bytes) -> None:
    """Under a temporary name first, so that no half file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
