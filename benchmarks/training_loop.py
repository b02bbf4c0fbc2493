# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Times the loop of examples/train_tread.py beside the bare step that it contains, and says where the rest goes.

    python benchmarks/training_loop.py --output benchmarks/results/training_loop_cpu.json
    python benchmarks/training_loop.py --preset XL/2 --batch_size 256 --steps_per_turn 10 --compile \\
        --device cuda --dtype bfloat16

The loop is the script's own, run with its flags: random latents from disk, draws, clipping, average, log, checkpoint.
Its steps and bare steps take turns; a bare step is loss, backward and AdamW on the same model, with one batch that is
on the device. The parts are the host's seconds: an accelerator's work for them is only in the total.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import DTYPES, finish_report, latent_size, make_parser, set_up, start_report, summary
from diffusers import AutoencoderKL

from diffusers_tread.data import LatentsInfo, LatentsWriter
from diffusers_tread.fingerprint import weights_fingerprint


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_tread  # noqa: E402


NUM_CLASSES, NUM_LATENTS = 1000, 1024
PARTS = ("data", "clipping", "average", "schedule", "log")
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=7, warmup=1)
    add = parser.add_argument
    add("--preset", default="B/2", help="Size of the model.")
    add("--tokens", type=int, default=256, help="Tokens per image, a square number.")
    add("--batch_size", type=int, default=8, help="Images per step.")
    add("--steps_per_turn", type=int, default=1, help="Steps that are timed together; the last one is logged.")
    add("--checkpointing_steps", type=int, default=10_000, help="Steps that share a checkpoint, as in the recipes.")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="Below float32 by autocast; weights stay float32.")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="As train_tread.py's.")
    add("--matmul_precision", choices=("highest", "high", "medium"), default="highest", help="As train_tread.py's.")
    add("--folder", type=Path, help="Where to write latents and checkpoint; by default temporary files.")
    args = parser.parse_args(argv)

    set_up(args)
    for name in ("batch_size", "steps_per_turn", "checkpointing_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"Expected --{name} >= 1, got {getattr(args, name)}.")
    latent_size(args.preset, args.tokens)  # raises for a wrong number
    if args.device != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"Expected --device cpu, the only one here, got {args.device}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it writes."""
    args = parse_args(argv)
    report = start_report("training_loop.py", argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        write_latents(Path(root), args)
        row = run_loop(Path(root), args)
    del args.folder
    report = finish_report(report, args, rows=[row])
    print(table(report))
    return report


def write_latents(root: Path, args: argparse.Namespace) -> None:
    """`latents`, random ones in the package's format, and `vae`, a tiny one that could have made them."""
    torch.manual_seed(args.seed)
    size = latent_size(args.preset, args.tokens)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(root / "vae")
    info = LatentsInfo(
        kind="moments", dtype="float16", latent_channels=4, latent_size=size, resolution=size, scaling_factor=1.0,
        vae={"name_or_path": str(root / "vae"), "fingerprint": weights_fingerprint(vae)}, source={},
        id2label={label: str(label) for label in range(NUM_CLASSES)}, num_samples=1, shards=(),
    )  # fmt: skip
    writer = LatentsWriter(root / "latents", info, num_shards=1)
    writer.open({})
    moments = torch.rand(NUM_LATENTS, 8, size, size).half()
    labels = torch.randint(NUM_CLASSES, (NUM_LATENTS,))
    writer.write(0, [{"names": labels.tolist(), "unreadable": [], "moments": moments, "label": labels}])
    writer.finish()


def run_loop(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row: train_tread.py from its first step to its checkpoint, with bare steps in between."""
    steps = (args.warmup + args.repeats) * args.steps_per_turn
    flags = {
        "data": f"latents:{root / 'latents'}", "output_dir": root / "run", "preset": args.preset, "objective": "edm",
        "train_batch_size": args.batch_size, "max_train_steps": steps, "checkpointing_steps": steps,
        "logging_steps": args.steps_per_turn, "dense_fraction": 0, "seed": args.seed,
        "mixed_precision": MIXED_PRECISION[args.dtype], "matmul_precision": args.matmul_precision,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in flags.items()]
    argv += ["--use_ema", "--compile" if args.compile else "--no-compile"]
    use_cpu = {"ACCELERATE_USE_CPU": str(args.device == "cpu").lower()}

    trainers = []

    def make_trainer(*arguments, **settings):
        trainers.append(TimedTrainer(*arguments, **settings))
        return trainers[0]

    with mock.patch.object(train_tread, "Trainer", make_trainer), mock.patch.dict(os.environ, use_cpu):
        train_tread.main(argv)
    return make_row(trainers[0], args)


class TimedTrainer(train_tread.Trainer):
    """The script's trainer, whose log ends a turn of the loop and runs one of bare steps."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.turns = {"loop": [], "bare": []}  # seconds of each turn
        self.parts = defaultdict(list)  # seconds of each call
        self.checkpoint_seconds, self.checkpoint_bytes = None, None

        def timed(part, work):
            def run(*arguments, **settings):
                start = time.perf_counter()
                result = work(*arguments, **settings)
                self.parts[part].append(time.perf_counter() - start)
                return result

            return run

        self.next_batch = timed("data", self.next_batch)
        self.accelerator.clip_grad_norm_ = timed("clipping", self.accelerator.clip_grad_norm_)
        self.lr_scheduler.step = timed("schedule", self.lr_scheduler.step)
        self.write_log = timed("log", super().log)
        self.average = timed("average", train_tread.update_ema)

    def train(self) -> None:
        self.batch = super().next_batch(0)
        self.start = self.now()
        with mock.patch.object(train_tread, "update_ema", self.average):
            super().train()

    def now(self) -> float:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def log(self, *arguments) -> None:
        self.write_log(*arguments)
        self.turns["loop"].append(self.now() - self.start)
        start = self.now()
        for _ in range(self.config.logging_steps):
            self.bare_step()
        self.start = self.now()
        self.turns["bare"].append(self.start - start)

    def bare_step(self) -> None:
        optimizer = self.optimizer.optimizer  # torch's own
        latents, conditions, routing = self.batch
        loss = self.objective.loss(self.model, latents, **conditions, routing=routing)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def save_checkpoint(self, step: int) -> None:
        start = self.now()
        super().save_checkpoint(step)
        self.checkpoint_seconds = self.now() - start
        files = Path(self.config.output_dir).glob("checkpoint-*/**/*")
        self.checkpoint_bytes = sum(path.stat().st_size for path in files if path.is_file())


def make_row(trainer: TimedTrainer, args: argparse.Namespace) -> dict[str, Any]:
    warm = args.warmup * args.steps_per_turn
    loop, bare = (
        [turn / args.steps_per_turn for turn in trainer.turns[kind][args.warmup :]] for kind in trainer.turns
    )
    bare_step = statistics.median(bare)
    parts = {part: statistics.fmean(trainer.parts[part][warm if part != "log" else args.warmup :]) for part in PARTS}
    parts["log"] /= args.steps_per_turn
    overhead = statistics.median(loop) / bare_step - 1.0
    checkpoint_share = trainer.checkpoint_seconds / args.checkpointing_steps / bare_step
    is_cuda = trainer.accelerator.device.type == "cuda"
    return {
        "preset": args.preset,
        "num_tokens": args.tokens,
        "batch_size": args.batch_size,
        "device": trainer.accelerator.device.type,
        "loop_seconds": summary(loop),
        "bare_seconds": summary(bare),
        "overhead": overhead,
        "overhead_of_pairs": summary([one / other - 1.0 for one, other in zip(loop, bare, strict=True)]),
        **{f"{part}_seconds": seconds for part, seconds in parts.items()},
        **{f"{part}_share": seconds / bare_step for part, seconds in parts.items()},
        "other_share": overhead - sum(parts.values()) / bare_step,
        "checkpoint_seconds": trainer.checkpoint_seconds,
        "checkpoint_bytes": trainer.checkpoint_bytes,
        "checkpoint_share": checkpoint_share,
        "overhead_with_checkpoints": overhead + checkpoint_share,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown: medians, and shares of the bare step."""
    every = report["settings"]["checkpointing_steps"]
    head = ["training loop", "bare step, ms", "loop, ms", "data", "clipping", "average", "schedule, log", "other"]
    head += [f"checkpoint every {every:,}", "overhead", "a checkpoint, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        shares = [row[f"{part}_share"] for part in ("data", "clipping", "average")]
        shares += [row["schedule_share"] + row["log_share"], row["other_share"]]
        shares += [row["checkpoint_share"], row["overhead_with_checkpoints"]]
        cells = [f"{row['preset']}, {row['num_tokens']} tokens, batch {row['batch_size']}, routed"]
        cells += [f"{row[f'{kind}_seconds']['median'] * 1e3:.0f}" for kind in ("bare", "loop")]
        cells += [f"{share:.1%}" for share in shares]
        cells += [f"{row['checkpoint_seconds']:.1f} ({row['checkpoint_bytes'] / 1e9:.2f} GB)"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
