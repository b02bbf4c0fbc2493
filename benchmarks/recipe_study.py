# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The phases of recipe.py: learning rates, times of steps, runs."""

import argparse
import dataclasses
import gc
import itertools
import json
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from common import summary, time_in_turns, write_whole
from profile_step import profile_step
from recipe_report import end_steps, summarise
from recipe_train import Recipe, RecipeRun
from recipe_workers import Shared, Task, Workers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


SWEEP_SEED = 1000  # of no reported run


class Study:
    """The phases of the benchmark, which add to one report.

    Args:
        args: Flags; its `lr` and `muon_lr` are set by the sweep.
        report: What is filled and written.
        shared: What all trainings use.
        workers: Who trains.
        start: When it began, `time.perf_counter`.
    """

    def __init__(
        self, args: argparse.Namespace, report: dict[str, Any], *, shared: Shared, workers: Workers, start: float
    ):
        self.args, self.report, self.shared, self.workers, self.start = args, report, shared, workers, start
        names = [*args.variants, *args.alone]
        self.recipes = {name: Recipe.parse(name, depth=args.depth) for name in names}
        self.runs: dict[str, RecipeRun] = {}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def prepare(self) -> None:
        """Counts the FLOPs and takes first steps of each variant here, while the workers sweep the rates."""
        with ThreadPoolExecutor(1) as thread:
            sweep = thread.submit(self.sweep)
            if not self.args.workers:
                sweep.result()  # this process does it
            for name in self.recipes:
                self.attempt(f"prepare {name}", self.make_run, name)
            sweep.result()
        self.save()

    def make_run(self, name: str) -> None:
        """Makes the run of a variant whose steps are timed."""
        run = Task(args=self.args, recipe=self.recipes[name], seed=self.args.seed).run(self.shared)
        run.model.train()
        self.recipes[name] = dataclasses.replace(self.recipes[name], step_flops=count_flops(run))
        for step in range(2):
            run.step(step)
        if not run.loss_sum.isfinite():
            raise ValueError(f"Expected a finite loss after two steps, got {run.loss_sum.item()}.")
        self.runs[name] = run
        print(f"{self.seconds:6.0f} s  {name}: {self.recipes[name].step_flops / 1e12:.3f} TFLOP a step", flush=True)

    # ----------------------------------------------------------------------------------------------------------- rates

    def sweep(self) -> None:
        """Chooses the learning rates: AdamW's, then Muon's with it."""
        for flag, piece in (("lr", "tread"), ("muon_lr", "muon")):
            name = next((name for name in self.recipes if piece in name.split("+")), None)
            if name is None:
                continue
            tasks = [self.sweep_task(name, flag, rate) for rate in getattr(self.args, f"{flag}s")]
            for task, message in self.workers.run(tasks, lambda task: True):
                row = {"variant": name, "flag": flag, "rate": getattr(task.args, flag)}
                if "error" in message:
                    self.report["sweep"].append(row | {"heldout_loss": None, "error": message["error"]})
                elif message.get("point", {}).get("step") == task.args.steps:
                    self.report["sweep"].append(row | {"heldout_loss": message["point"]["heldout_loss"]})
            rows = [row for row in self.report["sweep"] if row["flag"] == flag and row["heldout_loss"] is not None]
            if rows:
                setattr(self.args, flag, min(rows, key=lambda row: row["heldout_loss"])["rate"])
            print(f"{self.seconds:6.0f} s  {flag} {getattr(self.args, flag):g} of {rows}", flush=True)

    def sweep_task(self, name: str, flag: str, rate: float) -> Task:
        changed = {flag: rate, "steps": self.args.sweep_steps, "evaluations": 1, "samples_at": 0}
        args = argparse.Namespace(**vars(self.args) | changed)
        return Task(args=args, recipe=self.recipes[name], seed=SWEEP_SEED)

    # ----------------------------------------------------------------------------------------------------------- times

    def time_steps(self) -> None:
        """Times the steps of all variants in turns, and then what the GPU's kernels take of them."""
        turns = {name: self.make_turn(run) for name, run in self.runs.items()}
        for name, seconds in time_in_turns(turns, self.args).items():
            values = summary([one / self.args.steps_per_turn for one in seconds])
            self.report["steps"][name] = {"seconds": values, "flops": self.recipes[name].step_flops}
        if torch.device(self.args.device).type == "cuda":
            one = argparse.Namespace(device=self.args.device, repeats=1)
            for name, run in self.runs.items():
                kernels = self.attempt(f"profile {name}", profile_step, lambda run=run: run.step(0), 0, one) or {}
                self.report["steps"][name]["kernel_seconds"] = sum(kernels.values()) or None
        self.save()

        # The workers need the memory.
        self.runs.clear()
        turns.clear()
        gc.collect()  # compiled models refer to themselves
        torch.cuda.empty_cache()
        print(f"{self.seconds:6.0f} s  timed {len(self.report['steps'])} variants", flush=True)

    def make_turn(self, run: RecipeRun) -> Callable[[], None]:
        steps = itertools.cycle(range(self.args.steps))

        def turn() -> None:
            for _ in range(self.args.steps_per_turn):
                run.step(next(steps))

        return turn

    # ------------------------------------------------------------------------------------------------------------ runs

    def train(self) -> None:
        """Trains all variants with all seeds, those that show a piece alone last."""
        tasks = [
            Task(args=self.args, recipe=self.with_ends(name), seed=seed)
            for names in (self.args.variants, self.args.alone)
            for seed, name in itertools.product(self.args.seeds, names)
            if name in self.report["steps"]
        ]
        runs: dict[tuple[str, int], dict[str, Any]] = {}
        for task, message in self.workers.run(tasks, lambda task: self.may_start(task, runs)):
            key = task.recipe.name, task.seed
            if key not in runs:
                runs[key] = {"variant": key[0], "seed": key[1], "finished": False, "points": []}
                self.report["runs"].append(runs[key])
            self.take(runs[key], message)
        self.report["left_out"] = [
            f"{task.recipe.name}, seed {task.seed}" for task in tasks if (task.recipe.name, task.seed) not in runs
        ]
        self.save()
        print(f"{self.seconds:6.0f} s  done; left out: {', '.join(self.report['left_out']) or 'nothing'}", flush=True)

    def with_ends(self, name: str) -> Recipe:
        return dataclasses.replace(self.recipes[name], ends=tuple(end_steps(self.report, name).values()))

    def may_start(self, task: Task, runs: dict[tuple[str, int], dict[str, Any]]) -> bool:
        """Whether a run that takes as long as the longest one so far would end within the limit."""
        expected = max((run.get("wall_seconds", 0.0) for run in runs.values()), default=0.0)
        return self.args.time_limit is None or self.seconds + expected <= self.args.time_limit

    def take(self, run: dict[str, Any], message: dict[str, Any]) -> None:
        """Adds a message to a run and writes the report."""
        name = f"{run['variant']}, seed {run['seed']}"
        run.setdefault("started_at", self.seconds)
        if point := message.get("point"):
            run["points"].append(point)
            distances = {scale: round(one["distance"], 2) for scale, one in point.get("samples", {}).items()}
            told = f"step {point['step']}: held-out loss {point['heldout_loss']:.4f} {distances or ''}"
        else:
            run["wall_seconds"] = self.seconds - run["started_at"]
            run["finished"] = message.get("finished", False)
            told = message.get("error", "finished")
            self.report["failures"] += [] if run["finished"] else [{"what": name, "error": told}]
        print(f"{self.seconds:6.0f} s  {name}, {told}", flush=True)
        if "point" not in message or "samples" in message["point"]:
            self.save()

    def attempt(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; None where it fails, which is reported."""
        try:
            return function(*arguments)
        except Exception as error:
            traceback.print_exc()
            self.report["failures"].append({"what": what, "error": f"{type(error).__name__}: {error}"})
            return None

    def save(self) -> None:
        self.report["settings"] |= {"lr": self.args.lr, "muon_lr": self.args.muon_lr}
        self.report["summary"] = summarise(self.report)
        if self.args.output is not None:
            write_whole(self.args.output, (json.dumps(self.report, indent=2) + "\n").encode())


def count_flops(run: RecipeRun) -> int:
    """Of a routed step with teacher, projector and optimiser, attention decomposed; the run takes it, not compiled."""
    torch.compiler.set_stance("force_eager")
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run.step(0)
    finally:
        torch.compiler.set_stance("default")
    return counter.get_total_flops()
