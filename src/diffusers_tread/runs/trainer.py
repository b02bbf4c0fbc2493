# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loop around a training step: batches and seeds, checkpoints and resume, actions that are due after a step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data import TrainingSource
from ..objectives import LossTerm
from ..routing import RoutingCall
from ..seeds import derive_seed
from . import setup
from .checkpoints import load_checkpoint, save_checkpoint, settle_buckets
from .config import FREE_FIELDS, RunConfig
from .folder import PIPELINE, RunFolder, open_run_folder
from .monitor import CorruptImages, LossByTime, LossMonitor, check_weights
from .optimizers import make_optimizer, read_group_settings
from .outputs import RunOutputs
from .signals import StopRequest


@contextmanager
def open_run(
    config: RunConfig,
    accelerator: Accelerator,
    settings: dict[str, Any],
    argv: Sequence[str] | None,
    *,
    fixed_settings: Sequence[str] = ("model", "optimizer"),
    results: Sequence[str] = (PIPELINE,),
) -> Iterator[dict[str, Any]]:
    """Opens a run: claims its folder, starts its trackers and handles the signals that stop it.

    Args:
        config: The run's config.
        accelerator: The run's accelerator.
        settings: Everything the run depends on.
        argv: The command line, for the message that says how to resume.
        fixed_settings: Keys of `settings` that must be the same to resume a checkpoint.
        results: Files or folders that a finished run leaves in the folder.

    Yields:
        The arguments `run` and `stop` of `TrainingLoop`.

    Raises:
        ValueError: As for `open_run_folder`.
    """
    options = {"resume_from_checkpoint": config.resume_from_checkpoint, "overwrite": config.overwrite_output_dir}
    options |= {"fixed_settings": fixed_settings, "free_settings": FREE_FIELDS, "results": results}
    # The command that resumes the run must neither overwrite it nor go back again, even if a config file says so.
    overrides = ["--no-overwrite_output_dir"] if config.overwrite_output_dir else []
    overrides += ["--resume_from_checkpoint=latest"] if config.resume_from_checkpoint else []
    stop_request, total_steps = StopRequest(argv, overrides=overrides), settings["max_train_steps"]
    with open_run_folder(config.output_dir, settings=settings, total_steps=total_steps, **options) as run:
        with stop_request as stop:
            setup.init_trackers(accelerator, config, settings)
            yield {"run": run, "stop": stop}


class TrainingLoop(ABC):
    """The state of a run; `train` runs it. A subclass defines the training step and the model's conditions.

    All random draws are functions of the seed, the step, the micro step and the process, so that a resumed run makes
    the same draws as one that was never stopped.

    Args:
        config: The run's config.
        accelerator: The run's accelerator.
        source: The run's data.
        model: The model, whose parameters that require gradients are trained.
        settings: The run's settings, from `describe_run`.
        run: The run's folder.
        stop: Says when a signal asks the run to stop.
        flops: FLOPs of training one sample, routed (True) and dense (False); None if they cannot be counted.
    """

    outputs: RunOutputs
    terms: Sequence[LossTerm] = ()
    """Further terms of the loss."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        source: TrainingSource,
        model: torch.nn.Module,
        settings: dict[str, Any],
        *,
        run: RunFolder,
        stop: StopRequest,
        flops: dict[bool, int] | None,
    ):
        self.config, self.accelerator, self.source, self.settings = config, accelerator, source, settings
        self.run, self.stop, self.max_steps = run, stop, settings["max_train_steps"]
        self.flops = flops if len(source.sizes) == 1 else None  # they are for images of one size
        self.objective = setup.make_objective(config, source)

        # Model and optimiser.
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        optimizer = make_optimizer(config, model)
        group_settings = read_group_settings(optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.watching = [LossByTime.for_model(self.model)] if config.log_loss_by_time else []
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.use_ema else None

        # Resume.
        state = {"global_step": 0, "samples_seen": 0}
        if run.checkpoint is not None:
            factor = source.resolution // source.latent_size
            shape = (source.channels, *(side // factor for side in source.sizes[0]))
            settle_buckets(self.model, shape, accelerator.device, self.null_conditions())
            state = load_checkpoint(accelerator, run.checkpoint, ema=self.ema, ema_names=self.names)
            accelerator.print(f"Resuming from {run.checkpoint}.")
        self.step, self.samples_seen = state["global_step"], state["samples_seen"]
        progress = {"step": self.step, "max_steps": self.max_steps}
        self.lr_scheduler = setup.make_lr_scheduler(config, self.optimizer, group_settings, **progress)

        # Data and generator.
        self.wants_images = any(term.wants_images for term in self.terms)
        stored = {} if source.has_images or not self.wants_images else {"features": True}
        self.batches = source.batches(
            **stored,
            batch_size=config.train_batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            samples_seen=self.samples_seen,
            stream_positions=state.get("stream_positions"),
        )
        self.position = None
        self.corrupt = CorruptImages(config.max_corrupt_images, state.get("corrupt_images", []))
        self.generator, self.is_routed = torch.Generator(accelerator.device), True

    @property
    def weights(self) -> list[torch.Tensor]:
        """The weights to show and save, in the order of `names`: the averages with EMA, else the parameters."""
        return self.parameters if self.ema is None else self.ema.shadow_params

    @abstractmethod
    def train_step(self) -> torch.Tensor:
        """Takes one optimiser step. Returns this process's loss as a tensor, so that nothing waits for the device."""

    @abstractmethod
    def conditions(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The model's conditions for a batch, on the device; `generator` decides which of them are dropped."""

    @abstractmethod
    def null_conditions(self) -> dict[str, Any]:
        """The model's conditions for one sample without label or caption."""

    def train(self) -> None:
        """Trains from the current step to the last one."""
        # What is done every so many steps.
        config, accelerator = self.config, self.accelerator
        first_dense_step = round(self.max_steps * (1 - config.dense_fraction))
        outputs, push_steps = self.outputs, config.hub_push_steps or self.max_steps
        actions = {self.save_checkpoint: config.checkpointing_steps, outputs.save_grid: config.validation_steps}
        actions |= {outputs.measure_fid: config.eval_steps, outputs.push: push_steps if config.push_to_hub else None}

        # After a checkpoint, the run may have been killed before its other actions.
        if self.step > 0:
            for action in [action for action, every in list(actions.items())[1:] if self.is_due(every)]:
                action(self.step)

        # Train.
        self.model.train()
        total_batch_size = self.settings["total_batch_size"]
        monitor = LossMonitor(accelerator, step=self.step, samples_per_step=total_batch_size)
        is_quiet = not accelerator.is_main_process
        with tqdm(total=self.max_steps, initial=self.step, desc="Steps", disable=is_quiet) as progress:
            while self.step < self.max_steps:
                self.is_routed = self.step < first_dense_step
                monitor.add(self.train_step())
                self.step += 1
                self.samples_seen += total_batch_size
                progress.update()

                # Check loss and weights before a checkpoint or samples are made.
                due = [action for action, every in actions.items() if self.is_due(every)]
                if is_stopped := self.stop.is_due():
                    due = [self.save_checkpoint]
                if due or self.step % config.logging_steps == 0:
                    self.log(progress, *monitor.read(self.step))
                if due:
                    check_weights(accelerator, self.parameters, step=self.step)
                for action in due:
                    action(self.step)
                if is_stopped:
                    self.stop.end(f"Saved checkpoint-{self.step} in {config.output_dir}")
                if due:
                    monitor.restart_clock()

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last one, happens now."""
        return every is not None and (self.step % every == 0 or self.step == self.max_steps)

    def next_batch(self, micro_step: int) -> tuple[torch.Tensor, dict[str, Any], RoutingCall]:
        """The next latents, their conditions and how to route them.

        All draws are functions of the position in the run, which also seeds `generator`. If a loss term looks at
        images, sets `images` to those of the latents, or `image_features` to their stored features.
        """
        # Batch, conditions, latents.
        seed = partial(derive_seed, self.config.seed, self.step, micro_step, self.accelerator.process_index)
        batch = next(self.batches)
        self.position = batch.get("position")
        self.corrupt.add(batch["corrupt"])
        conditions = self.conditions(batch, torch.Generator().manual_seed(seed("labels")))
        self.generator.manual_seed(seed("noise"))
        latents = self.source.to_latents(batch, device=self.accelerator.device, generator=self.generator)

        # Images for the loss terms.
        source, device, self.images, self.image_features = self.source, self.accelerator.device, None, None
        if self.wants_images and source.has_images:
            self.images = source.images(batch, device=device)
        elif self.wants_images:
            self.image_features = source.image_features(batch, device=device)
        return latents, conditions, RoutingCall(selection_ratio=None if self.is_routed else 0.0, seed=seed("routing"))

    def log(self, progress: tqdm, loss: float, images_per_second: float) -> None:
        """Sends loss, learning rate and speed to the trackers and the progress bar."""
        values = {"loss": loss, "lr": self.lr_scheduler.get_last_lr()[0], "images_per_second": images_per_second}
        values |= {name: value for term in self.watching for name, value in term.read(self.accelerator).items()}
        shown = {"loss": f"{loss:.4f}", "img_s": f"{images_per_second:.1f}"}
        if self.flops is not None:
            values["model_tflops_per_second"] = images_per_second * self.flops[self.is_routed] / 1e12
            values["block_flops_saved"] = self.settings["block_flops_saved"] if self.is_routed else 0.0
            shown["flops_saved"] = f"{values['block_flops_saved']:.0%}"
        progress.set_postfix(shown | ({"corrupt": len(self.corrupt.names)} if self.corrupt.names else {}))
        self.accelerator.log(values, step=self.step)

    def save_checkpoint(self, step: int) -> None:
        """Writes `checkpoint-<step>`; all processes call it together."""
        state = {"global_step": step, "samples_seen": self.samples_seen, "settings": self.settings}
        state["corrupt_images"] = sorted(set(gather_object(sorted(self.corrupt.names))))
        if self.position is not None:
            state["stream_positions"] = gather_object([list(self.position)])
        options = {"state": state, "lineage": self.run.lineage, "total_limit": self.config.checkpoints_total_limit}
        options |= {"ema": self.ema, "ema_names": self.names}
        folder = save_checkpoint(self.accelerator, self.config.output_dir, step, **options)
        self.run.record(folder.name, "logs")
