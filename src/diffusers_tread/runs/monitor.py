# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a run reads only now and then, because each read waits for the device: loss, speed, finite weights."""

import math
import time
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..objectives import ForwardRecord, LossTerm
from .ema import local_shards


logger = get_logger(__name__)
_REMEDY = (
    "The last checkpoint is kept; go on from it with a lower --learning_rate and --resume_from_checkpoint latest."
)


class LossMonitor:
    """Sums the losses of steps on the device until they are read.

    Args:
        accelerator: The run's accelerator.
        step: Optimiser steps done before.
        samples_per_step: Samples per optimiser step, over all processes together.
    """

    def __init__(self, accelerator: Accelerator, *, step: int, samples_per_step: int):
        self.accelerator, self.samples_per_step = accelerator, samples_per_step
        self.loss_sum, self.step = torch.zeros((), device=accelerator.device), step
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time until now from the speed."""
        self.time = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one step on this process, a scalar tensor, without waiting for the device."""
        self.loss_sum += loss

    def read(self, step: int) -> tuple[float, float]:
        """Reads the mean loss over all processes and the samples per second since the last call.

        All processes call it together. `step` must be greater than at the last call.

        Raises:
            ValueError: The loss is not finite.
        """
        steps = step - self.step
        loss = self.accelerator.reduce(self.loss_sum / steps, reduction="mean").item()
        if not math.isfinite(loss):
            raise ValueError(f"Expected a finite loss, got {loss} between steps {self.step} and {step}. {_REMEDY}")
        samples_per_second = steps * self.samples_per_step / (time.perf_counter() - self.time)
        self.loss_sum.zero_()
        self.step = step
        self.restart_clock()
        return loss, samples_per_second


class LossByTime(LossTerm):
    """Sums the denoising loss by noise level, for each quarter of a batch, on the device; adds 0 to the loss.

    The samples of a batch are sorted by timestep and split into quarters. Quarters of the batch are used instead of
    quarters of an interval of timesteps, because they are never empty and work for every objective.
    """

    def __init__(self, device: torch.device):
        self.sums, self.count = torch.zeros(4, device=device), 0

    @classmethod
    def for_model(cls, model: torch.nn.Module) -> "LossByTime":
        return cls(next(model.parameters()).device)

    def __call__(self, record: ForwardRecord) -> torch.Tensor:
        losses = (record.prediction.detach() - record.target).square().mean(dim=(1, 2, 3))  # B
        quarters = losses[record.timestep.argsort()].tensor_split(4)
        self.sums += torch.stack([quarter.mean() for quarter in quarters])
        self.count += 1
        return torch.zeros_like(losses)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Reads the mean losses since the last call, least noise first. All processes call it together."""
        means = accelerator.reduce(self.sums / self.count, reduction="mean").tolist()
        self.sums.zero_()
        self.count = 0
        return {f"loss_t{quarter}": mean for quarter, mean in enumerate(means)}


class CorruptImages:
    """The unreadable images that one process has replaced.

    Args:
        most: Number of images that may be replaced; more are an error.
        names: Images that were replaced before the run was resumed.
    """

    def __init__(self, most: int, names: Iterable[str] = ()):
        self.most, self.names = most, set(names)

    def add(self, names: Iterable[str]) -> None:
        """Adds unreadable images and logs new ones.

        Raises:
            ValueError: There are more than `most`.
        """
        if new := sorted(set(names) - self.names):
            self.names.update(new)
            logger.warning(f"Replaced unreadable: {', '.join(new)}.", main_process_only=False)
        if len(self.names) > self.most:
            raise ValueError(
                f"Expected at most {self.most} unreadable images, got {len(self.names)}, such as "
                f"{sorted(self.names)[:5]}. Repair the data or raise --max_corrupt_images."
            )


def check_weights(accelerator: Accelerator, parameters: Iterable[torch.Tensor], *, step: int) -> None:
    """Checks that all weights are finite: the last loss was computed before the last update.

    Args:
        accelerator: The run's accelerator; all processes call this together.
        parameters: The weights, whole or sharded.
        step: The step, for the message.

    Raises:
        ValueError: A weight of any process is not finite; raised on all processes.
    """
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in local_shards(parameters)]).all()
    if accelerator.reduce((~finite).float(), reduction="sum").item() > 0:
        raise ValueError(f"Expected finite weights, got others after step {step}. {_REMEDY}")
