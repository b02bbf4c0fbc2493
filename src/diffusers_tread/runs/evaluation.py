# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Config of an evaluation: which images are judged, what they are compared with, which settings are swept."""

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
    """Which images are judged, what they are compared with, and how.

    Raises:
        ValueError: A value is out of its range, or fields contradict each other.
    """

    output_dir: str = "evaluation"
    """Folder for results, features and images; all processes must share it."""
    batch_size: int = 64
    """Images per process and forward pass."""
    guidance_scales: str | None = None
    """Several guidance scales to compare, such as 1,1.25,1.5. Each gets a folder of its own, and a curve is drawn."""
    sweep: str | None = None
    """Several values of other sampling settings to compare, as JSON or a JSON file: a grid such as
    {"guidance_scale": [1, 1.5], "weak_ratio": [0.7, 0.9]}, or a list of points such as [{"guidance": "none"}]."""
    num_kept_images: int = 40
    """Number of samples, from the first, to keep as PNG files and show in a grid."""

    # What is judged.
    images: str | None = None
    """Images to judge instead of a pipeline's: a folder, or an .npz file with arr_0."""
    resolution: int | None = None
    """Side in pixels to which images of folders and data sets are cropped and resized; None leaves them unchanged."""
    background: str = "white"
    """Colour put behind transparent images, such as white or #808080."""

    # What it is compared with.
    reference: str | None = None
    """Reference: an .npz file (ADM's, or one written by save_statistics) or a folder of images."""
    reference_dataset_name: str | None = None
    """Reference from a `datasets` repository instead; needs resolution."""
    reference_dataset_config_name: str | None = None
    """Configuration of the reference data set; None if it has only one."""
    reference_dataset_split: str = "train"
    """Split of the reference data set."""
    reference_image_column: str = "image"
    """Column of the reference data set with images."""
    cache_dir: str | None = None
    """Where downloaded data are kept; None for the cache of `datasets`."""
    reference_features_dir: str | None = None
    """Where the features of the reference are kept; None for the output folder."""
    save_statistics: str | None = None
    """Write the reference's statistics to this .npz file, for use as a later reference."""

    # How.
    metrics: str | None = None
    """Metrics from `diffusers_tread.metrics.METRICS`, such as fid,recall; None for all that are possible."""
    feature_extractor: str = "inception"
    """Network whose features are compared: inception, clean-fid:clean, transformers:NAME, timm:NAME, ..."""
    feature_extractor_weights: str | None = None
    """Local file with the weights of this network; None to download them."""
    scorers: str | None = None
    """Scorers of image and prompt from `diffusers_tread.metrics.SCORERS`, such as clip. They need prompts, but no
    reference."""
    clip_model: str = "openai/clip-vit-large-patch14"
    """Model of the scorer clip: a CLIP or SigLIP of transformers, as a folder or a repository on the Hub."""
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
            alone = self.at(point)  # checks the point
            if alone.guidance in ("sparse", "auto"):
                make_guider(alone)
        swept = {name for point in self.points for name in point.values}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if twice := sorted(name for name in swept if getattr(self, name) != defaults[name]):
            raise ValueError(f"Expected {twice} either as flags or in a sweep, got both.")
        require("eval", "matplotlib")  # for the curves

    @property
    def is_sweep(self) -> bool:
        """Whether several sampling settings are compared."""
        return self.sweep is not None or self.guidance_scales is not None

    @property
    def points(self) -> list[SweepPoint]:
        """The settings to compare.

        Raises:
            ValueError: A guidance scale is not a finite number; as for `read_points`.
        """
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
        """The config of a single point. Raises ValueError if its values are not valid."""
        values = {name: value for name, value in point.values.items() if value is not None}  # None is the default
        try:
            return dataclasses.replace(self, sweep=None, guidance_scales=None, **values, **changes)
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
        """The metrics to compute; None for all that are possible."""
        return self.metrics.split(",") if self.metrics else None
