# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Outputs that a run makes from its weights: sample grids, FIDs, the pipeline in its folder and on the Hub."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..data import TrainingSource
from ..files import whole
from ..hub import BackgroundPush, CardDetails, export_for_hub
from ..metrics import FeatureExtractor, ImageSource, PipelineImages
from ..pictures import save_image
from ..pipelines import TREADPipeline
from .config import RunConfig
from .fid_curve import PICTURE, RECORDS, FIDCurve
from .folder import PIPELINE, RunFolder
from .samples import last_grid, log_grid, sample_grid, snapshot_pipeline


class RunOutputs(ABC):
    """Makes pipelines from a run's current weights, without routing, to sample, measure, push and save them.

    The training is not affected. All processes call the methods together; the main process writes. A subclass defines
    how pipelines and samples are made.

    Args:
        config: The run's config.
        accelerator: The run's accelerator.
        source: The run's data.
        settings: The run's settings, from `describe_run`.
        run: The run's folder.
        weights: The parameters or their averages, whole or sharded.
        names: Their names, in the same order.
        extractor: The network for the FID; None without --eval_steps.
        step: The step that the run goes on from.
    """

    export = staticmethod(export_for_hub)
    """Function that writes the folder to push to the Hub."""
    result = PIPELINE
    """Name of the folder that `finish` writes."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        source: TrainingSource,
        settings: dict[str, Any],
        *,
        run: RunFolder,
        weights: Sequence[torch.Tensor],
        names: Sequence[str],
        extractor: FeatureExtractor | None,
        step: int,
    ):
        self.config, self.accelerator, self.source, self.settings = config, accelerator, source, settings
        self.run, self.weights, self.names = run, weights, names
        self.background_push, self.fid_curve = None, None
        if config.push_to_hub and accelerator.is_main_process:
            folder = Path(config.output_dir, "hub")
            options = {"private": config.hub_private, "export": self.export}
            self.background_push = BackgroundPush(config.hub_model_id, folder, **options)
        if extractor is not None:
            self.fid_curve = FIDCurve(
                accelerator,
                config.output_dir,
                step=step,
                extractor=extractor,
                reference=config.eval_reference,
                image_size=self.image_size,
                num_samples=config.eval_num_samples,
                batch_size=config.eval_batch_size,
                sampling={**self.sampling, **self.sampled},
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of samples in pixels."""
        return self.source.resolution, self.source.resolution

    @property
    def sampling(self) -> dict[str, Any]:
        """How the samples for the FID are made."""
        config = self.config
        return {
            "num_inference_steps": config.eval_inference_steps,
            "guidance_scale": config.eval_guidance_scale,
            "seed": config.seed,
        }

    @property
    def sampled(self) -> dict[str, Any]:
        """What the samples show, such as a hash of their prompts, for the records of the FID."""
        return {}

    @abstractmethod
    def make_pipeline(self) -> DiffusionPipeline:
        """Makes a pipeline from the current weights."""

    @abstractmethod
    def make_grid(self, pipeline: DiffusionPipeline) -> PIL.Image.Image:
        """Makes a picture of samples; the noise of each image is the same in every grid."""

    @abstractmethod
    def make_samples(self, pipeline: DiffusionPipeline) -> ImageSource:
        """Makes the samples whose FID is measured."""

    def save_grid(self, step: int) -> None:
        """Writes a sample grid to `samples` and sends it to the trackers."""
        pipeline = self.make_pipeline()
        if self.accelerator.is_main_process:
            grid = self.make_grid(pipeline)
            picture = Path("samples", f"step-{step:07d}.png")
            save_image(grid, self.config.output_dir / picture)
            self.run.record(picture)
            log_grid(self.accelerator, grid, step=step)
        self.accelerator.wait_for_everyone()

    def measure_fid(self, step: int) -> None:
        """Measures the FID of samples, once for each step."""
        if self.fid_curve.has(step):
            return
        fid = self.fid_curve.measure(self.make_samples(self.make_pipeline()), step=step)
        self.run.record("eval", RECORDS, PICTURE)
        self.accelerator.print(f"Step {step}: FID {fid:.4g} of {self.config.eval_num_samples} samples.")
        self.accelerator.log({"fid": fid}, step=step)

    def push(self, step: int) -> None:
        """Starts a push to the Hub in the background; the last push waits for the ones before."""
        pipeline, is_last = self.make_pipeline(), step == self.settings["max_train_steps"]
        if self.background_push is None:
            return
        card = CardDetails(
            dataset=self.source.name,
            samples=last_grid(self.config.output_dir, step=step),
            step=None if is_last else step,
            training=self.settings,
        )
        if is_last:
            self.background_push.wait()
        self.background_push.start(pipeline, commit_message=f"Step {step}", card=card)
        self.run.record("hub")

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        """Writes a pipeline."""
        pipeline.save_pretrained(folder)

    def finish(self) -> None:
        """Ends the trackers, saves the `result` atomically and waits for the last push."""
        while self.accelerator.trackers:  # they write files as they end
            self.accelerator.trackers.pop().finish()
        pipeline, path = self.make_pipeline(), Path(self.config.output_dir, self.result)
        if self.accelerator.is_main_process:
            with whole(path) as folder:
                self.save(pipeline, folder)
            self.run.record(self.result, "logs")
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"Saved {path}.")
        if self.background_push is not None:
            self.background_push.wait()


class ClassOutputs(RunOutputs):
    """Outputs of a class-conditional run, see `RunOutputs`.

    Args:
        *args: As for `RunOutputs`.
        scheduler: The scheduler of the pipelines.
        **options: As for `RunOutputs`.
    """

    def __init__(self, *args: Any, scheduler: Any, **options: Any):
        super().__init__(*args, **options)
        self.scheduler = scheduler

    def make_pipeline(self) -> TREADPipeline:
        return snapshot_pipeline(
            self.accelerator,
            self.weights,
            self.names,
            model_class=self.settings["model_class"],
            model_config=self.settings["model"],
            scheduler=self.scheduler,
            vae=self.source.vae,
            id2label=self.source.id2label if self.settings["num_classes"] else None,
        )

    def make_grid(self, pipeline: TREADPipeline) -> PIL.Image.Image:
        config = self.config
        return sample_grid(
            pipeline,
            num_images=config.num_validation_images,
            seed=config.seed,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
        )

    def make_samples(self, pipeline: TREADPipeline) -> PipelineImages:
        return PipelineImages(pipeline, num_images=self.config.eval_num_samples, **self.sampling)
