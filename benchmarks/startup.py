# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times what happens around training: the import, the way to the first step, a checkpoint written and resumed from.

    python benchmarks/startup.py --output benchmarks/results/startup_cpu.json

Imports and first steps are timed in fresh processes, ours and diffusers' own DiT in turns. The first step is that of
examples/train_tread.py with the digits recipe, counted from the start of its process. Checkpoints hold weights,
AdamW's states and averaged weights; they are compared with plain writing (flushed to the disk) and reading of files of
the same sizes. Both the resume and the plain reading read from the system's cache, because the files were just
written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import finish_report, make_parser, set_up, start_report, summary, time_in_turns
from diffusers.training_utils import EMAModel

from diffusers_tread import EDMObjective, TREADTransformer2DModel
from diffusers_tread.files import sync
from diffusers_tread.runs.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

IMPORTS = {
    "peer": "from diffusers import DiTTransformer2DModel",
    "ours": "import diffusers_tread",
    "ours with the pipeline": "from diffusers_tread import TREADPipeline",
}

# Ends without the interpreter's clean-up, which is no part of a start.
TIME_IMPORT = """
import os, time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start, flush=True)
os._exit(0)
"""

TIME_FIRST_STEP = """
import json, os, sys, time
started, sys.path[0] = float(sys.argv[1]), sys.argv[2]
import train_tread
imported = time.time()
take_step = train_tread.Trainer.train_step

def time_step(trainer):
    ready = time.time()
    take_step(trainer).item()
    done = time.time()
    print(json.dumps([imported - started, ready - imported, done - ready]), flush=True)
    os._exit(0)

train_tread.Trainer.train_step = time_step
train_tread.main(sys.argv[3:])
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3, warmup=1)
    add = parser.add_argument
    add("--preset", default="S/2", help="Size of the model that checkpoints hold.")
    add("--first_steps", type=int, default=2, help="Training processes to start.")
    args = parser.parse_args(argv)
    set_up(args)
    if args.first_steps < 2:
        raise ValueError(f"Expected --first_steps >= 2, got {args.first_steps}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("startup.py", argv)
    rows = []
    for measure in (measure_imports, measure_first_step, measure_checkpoints):
        for row in measure(args):
            print(format_row(row), flush=True)
            rows.append(row)
    return finish_report(report, args, rows=rows)


def measure_imports(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of import statements; and those of ours beyond the peer's, pair by pair."""
    seconds = {name: [] for name in IMPORTS}
    for repeat in range(args.warmup + args.repeats):
        for name, statement in IMPORTS.items():
            output = run_python(TIME_IMPORT.format(statement=statement), args)
            if repeat >= args.warmup:
                seconds[name].append(float(output))

    rows = [{"what": f"`{IMPORTS[name]}`", "seconds": summary(values)} for name, values in seconds.items()]
    beyond = [ours - peer for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    rows.insert(2, {"what": "import beyond the peer", "seconds": summary(beyond)})
    return rows


def measure_first_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds from the start of a training process: modules imported, the run set up, the first step done."""
    parts = []
    for _ in range(args.first_steps):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--output_dir", folder, "--max_train_steps", "2", "--seed", str(args.seed)]
            output = run_python(TIME_FIRST_STEP, args, repr(time.time()), str(EXAMPLES), *flags)
            parts.append(json.loads(output.splitlines()[-1]))
    names = ("training: modules imported", "training: data, model and folder ready", "training: the first step itself")
    rows = [{"what": name, "seconds": summary([part[i] for part in parts])} for i, name in enumerate(names)]
    return [*rows, {"what": "training: process start to first step done", "seconds": summary([sum(p) for p in parts])}]


def measure_checkpoints(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A checkpoint through the trainer's own functions, beside files of the same sizes."""
    torch.manual_seed(args.seed)
    accelerator, ema, names = make_state(args)
    with tempfile.TemporaryDirectory() as folder:
        write = partial(save_checkpoint, accelerator, folder, 1, state={}, ema=ema, ema_names=names)
        files = {path.name: path.read_bytes() for path in write().iterdir()}
        plain = Path(folder, "plain")
        plain.mkdir()

        def write_plain() -> None:
            for name, content in files.items():
                (plain / name).write_bytes(content)
                sync(plain / name)

        def resume() -> None:
            load_checkpoint(accelerator, find_checkpoint(folder), ema=ema, ema_names=names)

        def read_plain() -> None:
            for path in plain.iterdir():
                path.read_bytes()

        steps = {
            "checkpoint: written": write,
            "files of its sizes: written": write_plain,
            "checkpoint: verified and resumed from": resume,
            "files of its sizes: read": read_plain,
        }
        seconds = time_in_turns(steps, args)
    megabytes = sum(map(len, files.values())) / 1e6
    return [{"what": name, "seconds": summary(values), "megabytes": megabytes} for name, values in seconds.items()]


def make_state(args: argparse.Namespace) -> tuple[Accelerator, EMAModel, list[str]]:
    """What `save_checkpoint` writes, after one training step of a small image."""
    accelerator = Accelerator(cpu=args.device == "cpu")
    model = TREADTransformer2DModel.from_preset(args.preset, sample_size=16).train()
    names = [name for name, _ in model.named_parameters()]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    latents = torch.randn(1, 4, 16, 16, device=accelerator.device)
    EDMObjective().loss(model, latents).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return accelerator, EMAModel(list(model.parameters())), names


def run_python(program: str, args: argparse.Namespace, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if args.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"A process to time ended with {result.returncode}: {result.stderr.strip()[-2000:]}")
    return result.stdout


def format_row(row: dict[str, Any]) -> str:
    rate = f" {rate_of(row):8.0f} MB/s" if "megabytes" in row else ""
    return f"{row['what']:56} {row['seconds']['median']:8.3f} s{rate}"


def rate_of(row: dict[str, Any]) -> float:
    """MB/s of a row about files."""
    return row["megabytes"] / row["seconds"]["median"]


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown: medians."""
    lines = ["| what | s | MB | MB/s |", "|---|---|---|---|"]
    for row in report["rows"]:
        size = f"{row['megabytes']:,.0f} | {rate_of(row):,.0f}" if "megabytes" in row else "- | -"
        lines.append(f"| {row['what']} | {row['seconds']['median']:.2f} | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
