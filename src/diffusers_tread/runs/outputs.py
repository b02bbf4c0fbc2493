# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a run makes of its weights: grids, FIDs, the pipeline in its folder and on the Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import TrainingSource
from ..files import whole
from ..hub import BackgroundPush, CardDetails
from ..metrics import FeatureExtractor
from ..pictures import save_image
from ..pipelines import TREADPipeline
from .config import TrainConfig
from .fid_curve import PICTURE, RECORDS, FIDCurve
from .folder import PIPELINE, RunFolder
from .samples import last_grid, log_grid, sample_grid, snapshot_pipeline


class RunOutputs:
    """Makes pipelines of a run's weights as they are and does something with them; dense, leaving the training alone.

    All processes call the methods together; the main one writes.

    Args:
        config: Of the run.
        accelerator: Of the run.
        source: Its data.
        settings: As `describe_run` gives them.
        run: Its folder.
        weights: The parameters or their averages, whole or sharded.
        names: Their names, in the same order.
        scheduler: Of the pipelines.
        extractor: What measures the FID; None without --eval_steps.
        step: That the run goes on from.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        source: TrainingSource,
        settings: dict[str, Any],
        *,
        run: RunFolder,
        weights: Sequence[torch.Tensor],
        names: Sequence[str],
        scheduler: Any,
        extractor: FeatureExtractor | None,
        step: int,
    ):
        self.config, self.accelerator, self.source, self.settings = config, accelerator, source, settings
        self.run, self.weights, self.names, self.scheduler = run, weights, names, scheduler
        self.background_push, self.fid_curve = None, None
        if config.push_to_hub and accelerator.is_main_process:
            folder = Path(config.output_dir, "hub")
            self.background_push = BackgroundPush(config.hub_model_id, folder, private=config.hub_private)
        if extractor is not None:
            self.fid_curve = FIDCurve(
                accelerator,
                config.output_dir,
                step=step,
                extractor=extractor,
                reference=config.eval_reference,
                image_size=source.resolution,
                num_samples=config.eval_num_samples,
                batch_size=config.eval_batch_size,
                num_inference_steps=config.eval_inference_steps,
                guidance_scale=config.eval_guidance_scale,
                seed=config.seed,
            )

    def make_pipeline(self) -> TREADPipeline:
        """A pipeline of the weights as they are now."""
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

    def save_grid(self, step: int) -> None:
        """A picture in `samples`, and with the trackers."""
        config, pipeline = self.config, self.make_pipeline()
        if self.accelerator.is_main_process:
            grid = sample_grid(
                pipeline,
                num_images=config.num_validation_images,
                seed=config.seed,
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.validation_guidance_scale,
            )
            picture = Path("samples", f"step-{step:07d}.png")
            save_image(grid, config.output_dir / picture)
            self.run.record(picture)
            log_grid(self.accelerator, grid, step=step)
        self.accelerator.wait_for_everyone()

    def measure_fid(self, step: int) -> None:
        """The FID of samples, once for each step."""
        if self.fid_curve.has(step):
            return
        fid = self.fid_curve.measure(self.make_pipeline(), step=step)
        self.run.record("eval", RECORDS, PICTURE)
        self.accelerator.print(f"Step {step}: FID {fid:.4g} of {self.config.eval_num_samples} samples.")
        self.accelerator.log({"fid": fid}, step=step)

    def push(self, step: int) -> None:
        """Starts a push to the Hub; that of the last step waits for those before."""
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

    def finish(self) -> None:
        """Saves `output_dir/pipeline`, whole or not at all, ends the trackers and waits for the last push."""
        while self.accelerator.trackers:  # which write files as they end
            self.accelerator.trackers.pop().finish()
        pipeline, path = self.make_pipeline(), Path(self.config.output_dir, PIPELINE)
        if self.accelerator.is_main_process:
            with whole(path) as folder:
                pipeline.save_pretrained(folder)
            self.run.record(PIPELINE, "logs")
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"Saved {path}.")
        if self.background_push is not None:
            self.background_push.wait()
