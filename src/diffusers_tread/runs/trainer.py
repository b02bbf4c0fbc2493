# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loop around a training step: batches and seeds, checkpoints and resume, what is due after a step."""

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
    """A run in its folder, with its trackers, that a signal asks to end; gives `run` and `stop` for `TrainingLoop`.

    Args:
        config: Of the run.
        accelerator: Of the run.
        settings: All that it depends on.
        argv: The command line, for the message of how to go on.
        fixed_settings: Those that no checkpoint can be resumed without.
        results: What a finished run leaves in the folder.

    Raises:
        ValueError: As `open_run_folder`.
    """
    options = {"resume_from_checkpoint": config.resume_from_checkpoint, "overwrite": config.overwrite_output_dir}
    options |= {"fixed_settings": fixed_settings, "free_settings": FREE_FIELDS, "results": results}
    # What a config file asks for once, the command that goes on must not ask for again.
    overrides = ["--no-overwrite_output_dir"] if config.overwrite_output_dir else []
    overrides += ["--resume_from_checkpoint=latest"] if config.resume_from_checkpoint else []
    stop_request, total_steps = StopRequest(argv, overrides=overrides), settings["max_train_steps"]
    with open_run_folder(config.output_dir, settings=settings, total_steps=total_steps, **options) as run:
        with stop_request as stop:
            setup.init_trackers(accelerator, config, settings)
            yield {"run": run, "stop": stop}


class TrainingLoop(ABC):
    """Everything that lives through a run; `train` runs it. A subclass says what a step is and what the model is told.

    All random draws are functions of the seed, the step, the micro step and the process, so that a run goes on from a
    checkpoint as if nothing had happened.

    Args:
        config: Of the run.
        accelerator: Of the run.
        source: Its data.
        model: To be trained: its parameters that require gradients.
        settings: As `describe_run` gives them.
        run: Its folder.
        stop: That asks the run to end.
        flops: Of the training of one sample, routed (True) and dense (False); None where they cannot be counted.
    """

    outputs: RunOutputs
    terms: Sequence[LossTerm] = ()
    """Of the loss."""

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
        self.flops = flops if len(source.sizes) == 1 else None  # which are of images of one size
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
        """What is shown and saved, in the order of `names`: the averages, or the parameters."""
        return self.parameters if self.ema is None else self.ema.shadow_params

    @abstractmethod
    def train_step(self) -> torch.Tensor:
        """One optimiser step; the loss of this process as a tensor, so that nothing waits for the device."""

    @abstractmethod
    def conditions(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """What the model is told of a batch, on the device; some of it dropped by draws of the generator."""

    @abstractmethod
    def null_conditions(self) -> dict[str, Any]:
        """What the model is told of a sample of which nothing is known."""

    def train(self) -> None:
        """From where the run is to its last step."""
        config, accelerator = self.config, self.accelerator
        first_dense_step = round(self.max_steps * (1 - config.dense_fraction))
        outputs, push_steps = self.outputs, config.hub_push_steps or self.max_steps
        actions = {self.save_checkpoint: config.checkpointing_steps, outputs.save_grid: config.validation_steps}
        actions |= {outputs.measure_fid: config.eval_steps, outputs.push: push_steps if config.push_to_hub else None}
        if self.step > 0:  # the run may have been killed before it sampled what it had checkpointed
            for action in [action for action, every in list(actions.items())[1:] if self.is_due(every)]:
                action(self.step)
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

                # A checkpoint or samples are only made of weights that were looked at.
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
        """Latents, conditions and how to route; seeds the generator. All draws are functions of where the run is.

        `images` are those of the latents, where a term of the loss looks at them, or `image_features` what was stored
        of them.
        """
        seed = partial(derive_seed, self.config.seed, self.step, micro_step, self.accelerator.process_index)
        batch = next(self.batches)
        self.position = batch.get("position")
        self.corrupt.add(batch["corrupt"])
        conditions = self.conditions(batch, torch.Generator().manual_seed(seed("labels")))
        self.generator.manual_seed(seed("noise"))
        latents = self.source.to_latents(batch, device=self.accelerator.device, generator=self.generator)
        source, device, self.images, self.image_features = self.source, self.accelerator.device, None, None
        if self.wants_images and source.has_images:
            self.images = source.images(batch, device=device)
        elif self.wants_images:
            self.image_features = source.image_features(batch, device=device)
        return latents, conditions, RoutingCall(selection_ratio=None if self.is_routed else 0.0, seed=seed("routing"))

    def log(self, progress: tqdm, loss: float, images_per_second: float) -> None:
        """Tells the trackers and the progress bar how the run goes."""
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
        """Writes `checkpoint-<step>`; all processes together."""
        state = {"global_step": step, "samples_seen": self.samples_seen, "settings": self.settings}
        state["corrupt_images"] = sorted(set(gather_object(sorted(self.corrupt.names))))
        if self.position is not None:
            state["stream_positions"] = gather_object([list(self.position)])
        options = {"state": state, "lineage": self.run.lineage, "total_limit": self.config.checkpoints_total_limit}
        options |= {"ema": self.ema, "ema_names": self.names}
        folder = save_checkpoint(self.accelerator, self.config.output_dir, step, **options)
        self.run.record(folder.name, "logs")
