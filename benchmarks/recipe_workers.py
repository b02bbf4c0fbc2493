# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Runs the trainings of recipe.py, in processes that share a device or in this one, and passes on what they report."""

import argparse
import gc
import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from common import set_up
from convergence_train import Draws
from recipe_train import Recipe, RecipeEvaluation, RecipeRun, Teacher


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """What all trainings use, on the device."""

    images: torch.Tensor
    """[N, 3, H, W] uint8, for training."""
    labels: torch.Tensor
    """[N]."""
    evaluate: RecipeEvaluation
    teacher: Teacher


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A training."""

    args: argparse.Namespace
    recipe: Recipe
    seed: int

    def run(self, shared: Shared) -> RecipeRun:
        num_steps = self.recipe.num_steps(self.args.steps)
        return RecipeRun(
            self.args,
            self.recipe,
            self.seed,
            teacher=shared.teacher,
            images=shared.images,
            labels=shared.labels,
            draws=Draws.make(self.args, self.seed, steps=num_steps, num_images=len(shared.images)),
            num_classes=shared.evaluate.judge.num_classes,
        )


Message = dict[str, Any]
"""{"point": ...} for each evaluation, then {"finished": True}, or {"error": text}."""


def execute(task: Task, shared: Shared) -> Iterator[Message]:
    """Trains; what goes wrong becomes a message."""
    try:
        for point in task.run(shared).train(shared.evaluate):
            yield {"point": point}
    except Exception as error:
        traceback.print_exc()
        yield {"error": f"{type(error).__name__}: {error}"}
    else:
        yield {"finished": True}


def prepare_compiler() -> None:
    torch._dynamo.config.recompile_limit = 64  # a graph per number of tokens, of images and mode


def work(connection: Connection) -> None:
    """What a process does: reads its flags and what is shared, then tasks, until there are no more."""
    args, path = connection.recv()
    set_up(args)
    prepare_compiler()
    # Written by this script's own run. Each tensor comes back where it was: the judge's statistics are on the CPU.
    shared = torch.load(path, weights_only=False)
    while (task := connection.recv()) is not None:
        for message in execute(task, shared):
            connection.send(message)
        gc.collect()  # compiled models refer to themselves


class Workers:
    """Processes that train, or none: then this one does.

    They start when this is made, and import while the shared objects are still being made.

    Args:
        count: How many; 0 for this process.
    """

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.shared: Shared | None = None
        self.processes = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process ends the connection
            self.processes[ours] = process

    def share(self, args: argparse.Namespace, shared: Shared, path: Path) -> None:
        """Hands over what all trainings use, by a file."""
        self.shared = shared
        if self.processes:
            torch.save(shared, path)
        for connection in list(self.processes):
            self._send(connection, (args, path))

    def run(self, tasks: Iterable[Task], may_start: Callable[[Task], bool]) -> Iterator[tuple[Task, Message]]:
        """Runs tasks in their order, as many at once as there are processes, and gives their messages.

        Args:
            tasks: What to do.
            may_start: Asked before each one starts; where it says no, that one and those after it are left out.
        """
        waiting = deque(tasks)
        if not self.processes:
            while waiting and may_start(waiting[0]):
                task = waiting.popleft()
                yield from ((task, message) for message in execute(task, self.shared))
            return

        idle, busy = list(self.processes), {}
        while True:
            while idle and waiting and may_start(waiting[0]):
                if self._send(connection := idle.pop(0), waiting[0]):
                    busy[connection] = waiting.popleft()
            if not busy:
                return
            for connection in wait(list(busy)):
                task, message = busy[connection], self._receive(connection)
                if "point" not in message:
                    del busy[connection]
                    idle += [connection] if connection in self.processes else []
                yield task, message

    def _receive(self, connection: Connection) -> Message:
        """The next message; an error of a process that has died, which then is one of ours no more."""
        try:
            return connection.recv()
        except (EOFError, ConnectionError):
            process = self.processes.pop(connection)
            process.join(timeout=10)
            return {"error": f"The process ended with {process.exitcode}."}

    def _send(self, connection: Connection, value: Any) -> bool:
        """Whether the process is there; one that has died is one of ours no more."""
        try:
            connection.send(value)
        except ConnectionError:
            del self.processes[connection]
        return connection in self.processes

    def close(self) -> None:
        for connection, process in list(self.processes.items()):
            self._send(connection, None)
            process.join(timeout=30)
