# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation is told: what is judged, what it is compared with, and which settings are swept."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..installation import require
from ..metrics import METRICS
from .parsing import check_at_least
from .sampling import SamplingConfig, make_guider
from .sweep import SweepPoint, read_points


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SamplingConfig):
    """What is judged, what it is compared with, and how.

    Raises:
        ValueError: Values out of their ranges; fields of which one needs or excludes another.
    """

    output_dir: str = "evaluation"
    """Results, features and images; all processes must see it."""
    batch_size: int = 64
    """Images per process and forward."""
    guidance_scales: str | None = None
    """Instead of one scale: several, such as 1,1.25,1.5, each in a folder of its own, and a curve over them."""
    sweep: str | None = None
    """Likewise several values of other settings of sampling, as JSON or a file with it: a grid such as
    {"guidance_scale": [1, 1.5], "weak_ratio": [0.7, 0.9]}, or a list of points such as [{"guidance": "none"}]."""
    num_kept_images: int = 40
    """First samples of a pipeline to keep as PNG files, for the grid and the eye."""

    # What is judged.
    images: str | None = None
    """Instead of a pipeline: a folder of images, or an .npz file with arr_0."""
    resolution: int | None = None
    """Side in pixels to which images of folders and data sets are cropped and resized; None for as they are."""
    background: str = "white"
    """Colour behind transparent images, such as white or #808080."""

    # What it is compared with.
    reference: str | None = None
    """An .npz file (ADM's, or of save_statistics) or a folder of images."""
    reference_dataset_name: str | None = None
    """Instead: a `datasets` repository; needs a resolution."""
    reference_dataset_config_name: str | None = None
    """Its configuration; None for its only one."""
    reference_dataset_split: str = "train"
    """Its split."""
    reference_image_column: str = "image"
    """Its column with images."""
    cache_dir: str | None = None
    """Where downloaded data are kept; None for the cache of `datasets`."""
    reference_features_dir: str | None = None
    """Where a reference's features are kept; None for the output folder."""
    save_statistics: str | None = None
    """Write the reference's statistics to this .npz file, to be a reference later."""

    # How.
    metrics: str | None = None
    """Of `diffusers_tread.metrics.METRICS`, such as fid,recall; None for all that are possible."""
    feature_extractor: str = "inception"
    """inception, clean-fid:clean, transformers:NAME, timm:NAME ..."""
    feature_extractor_weights: str | None = None
    """A local file with its weights; None to download them."""
    scorers: str | None = None
    """With prompts: of `diffusers_tread.metrics.SCORERS`, such as clip; needs no reference."""
    clip_model: str = "openai/clip-vit-large-patch14"
    """Of the scorer clip: a CLIP or a SigLIP of transformers, a folder or a repository on the Hub."""
    scorer_file: str | None = None
    """A Python file of your own that calls `register_scorer`. It is executed."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "batch_size", "resolution")
        check_at_least(self, 0, "num_kept_images")

        # What is judged.
        judged = [name for name in (self.pretrained_pipeline, self.images) if name is not None]
        if len(judged) > 1 or not (judged or self.save_statistics):
            raise ValueError(
                f"Expected either --pretrained_pipeline or --images, or only --save_statistics, got {judged}. Name "
                "what is judged, and --reference or --scorers; --help lists the flags."
            )
        of_pipelines = {field.name for field in dataclasses.fields(SamplingConfig)}
        of_pipelines |= {"num_kept_images", "guidance_scales", "sweep"}
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        unused = [name for name in given if name in of_pipelines]
        if unused and self.pretrained_pipeline is None:
            raise ValueError(f"Expected {unused} only with --pretrained_pipeline. Leave them out.")

        # What it is compared with, or scored by.
        if (self.scorers or self.scorer_file) and not (self.has_prompts and self.scorers):
            raise ValueError("Expected --scorers and --scorer_file with --prompts, and no --scorer_file alone.")
        num_references = (self.reference is not None) + (self.reference_dataset_name is not None)
        if num_references == 2 or not (num_references or self.scorers):
            raise ValueError(
                "Expected either --reference or --reference_dataset_name, or --scorers, got both or none. Name what "
                "the images are compared with."
            )
        if not num_references and (self.metrics or self.save_statistics):
            raise ValueError("Expected a reference for --metrics and --save_statistics, got --scorers alone.")
        if self.reference_dataset_name is not None and self.resolution is None:
            raise ValueError("Expected --resolution for the images of --reference_dataset_name, got none.")
        is_cropped = self.reference_dataset_name is not None or any(
            name is not None and Path(name).is_dir() for name in (self.images, self.reference)
        )
        if self.resolution is not None and not is_cropped:
            raise ValueError("Expected --resolution only with a folder or a data set: nothing else is cropped.")
        of_statistics = [name for name, metric in METRICS.items() if metric.takes == "statistics"]
        if self.save_statistics and self.metrics and not set(self.metric_names) & set(of_statistics):
            raise ValueError(
                f"Expected any of {of_statistics} in --metrics for --save_statistics, got {self.metrics}."
            )
        if self.is_sweep:
            self._check_points()

    def _check_guidance(self) -> None:
        if not self.is_sweep:
            super()._check_guidance()

    def _check_points(self) -> None:
        for point in self.points:
            alone = self.at(point)  # which checks it
            if alone.guidance in ("sparse", "auto"):
                make_guider(alone)
        swept = {name for point in self.points for name in point.values}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if twice := sorted(name for name in swept if getattr(self, name) != defaults[name]):
            raise ValueError(f"Expected {twice} either as flags or in a sweep, got both.")
        require("eval", "matplotlib")  # which draws the curves

    @property
    def is_sweep(self) -> bool:
        """Whether several settings of sampling are compared."""
        return self.sweep is not None or self.guidance_scales is not None

    @property
    def points(self) -> list[SweepPoint]:
        """The settings that are compared. Raises ValueError for scales that are no numbers, and as `read_points`."""
        scales = []
        if self.guidance_scales is not None:
            try:
                scales = sorted({float(scale) for scale in self.guidance_scales.split(",")})
            except ValueError as error:
                raise ValueError(f"Expected --guidance_scales such as 1,1.25,1.5, got {error}.") from error
            if not all(map(math.isfinite, scales)):
                raise ValueError(f"Expected finite --guidance_scales, got {self.guidance_scales}.")
        return read_points(self.sweep or "{}", scales=scales)

    def at(self, point: SweepPoint, **changes: Any) -> "EvaluationConfig":
        """The config of one of the points alone. Raises ValueError for values that cannot be."""
        try:
            return dataclasses.replace(self, sweep=None, guidance_scales=None, **point.values, **changes)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected a point of a sweep that can be sampled, got {point.values}: {error}"
            ) from error

    @property
    def has_reference(self) -> bool:
        return self.reference is not None or self.reference_dataset_name is not None

    @property
    def scorer_names(self) -> list[str]:
        return self.scorers.split(",") if self.scorers else []

    @property
    def metric_names(self) -> list[str] | None:
        """The metrics; None for all that are possible."""
        return self.metrics.split(",") if self.metrics else None
