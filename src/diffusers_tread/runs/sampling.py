# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How a pipeline is sampled, for the scripts that do: flags, pipeline, scheduler, guider."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch

from ..guiders import SparseGuidance
from ..metrics import PipelineImages
from ..pipelines import TREADPipeline
from ..schedulers import SCHEDULERS
from .parsing import check_at_least, read_json


_GUIDANCE_FIELDS = {
    "pipeline": (),
    "none": (),
    "cfg": ("guidance_scale",),
    "sparse": ("guidance_scale", "strong_ratio", "weak_ratio", "guider_config"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A pipeline and how it is sampled.

    Raises:
        ValueError: A field is out of its range, or the guidance has no use for it.
    """

    pretrained_pipeline: str | None = None
    """A TREADPipeline: a folder or a repository on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the transformers; the VAE stays in float32."""
    num_samples: int = 50_000
    """Samples of the pipeline."""
    seed: int = 0
    """Sample i follows from this and i."""
    random_labels: bool = False
    """Draw classes at random, as ADM and DiT do, instead of one after the other."""
    num_inference_steps: int = 40
    """Steps of the sampler."""
    scheduler: str | None = None
    """Class of diffusers or diffusers_tread to sample with; None for the pipeline's."""
    scheduler_config: str = "{}"
    """Changes of its settings as JSON, such as {"shift": 3.0}."""
    guidance: Literal["pipeline", "none", "cfg", "sparse"] = "pipeline"
    """pipeline: the guider saved with it; cfg: classifier-free; sparse: Sparse Guidance."""
    guidance_scale: float | None = None
    """Of cfg, which needs it, or of sparse; None for the default of SparseGuidance."""
    strong_ratio: float | None = None
    """Of sparse: share of tokens, in [0, 1), routed away in the strong branch; None for the default."""
    weak_ratio: float | None = None
    """Of sparse: likewise in the weak branch."""
    guider_config: str | None = None
    """More settings of SparseGuidance as JSON, such as {"stop": 0.8}."""

    def __post_init__(self):
        check_at_least(self, 1, "num_samples", "num_inference_steps")
        given = {name for name in _GUIDANCE_FIELDS["sparse"] if getattr(self, name) is not None}
        if unused := sorted(given - set(_GUIDANCE_FIELDS[self.guidance])):
            raise ValueError(f"Expected only flags that --guidance {self.guidance} uses, got {unused}.")
        if self.guidance == "cfg" and self.guidance_scale is None:
            raise ValueError("Expected --guidance_scale with --guidance cfg, got none.")


def open_pipeline_images(
    config: SamplingConfig, device: torch.device, *, guider: SparseGuidance | None = None
) -> PipelineImages:
    """The samples that a config asks for, see `load_pipeline`."""
    return PipelineImages(
        load_pipeline(config, device, guider=guider),
        num_images=config.num_samples,
        num_inference_steps=config.num_inference_steps,
        guidance_scale={"none": 1.0, "cfg": config.guidance_scale}.get(config.guidance),
        seed=config.seed,
        random_labels=config.random_labels,
    )


def load_pipeline(
    config: SamplingConfig, device: torch.device, *, guider: SparseGuidance | None = None
) -> TREADPipeline:
    """The pipeline with the scheduler and the guider that a config asks for.

    Args:
        config: Of the samples.
        device: Of the networks.
        guider: Instead of the one that the config asks for.

    Raises:
        ValueError: There is no pipeline; it, the scheduler or the guider refuses a setting.
    """
    try:
        pipeline = TREADPipeline.from_pretrained(config.pretrained_pipeline, revision=config.revision)
    except OSError as error:
        raise ValueError(
            f"Expected a TREADPipeline in --pretrained_pipeline, got {config.pretrained_pipeline} ({error})."
        ) from error
    pipeline.scheduler = make_scheduler(pipeline.scheduler, config.scheduler, read_json(config.scheduler_config))
    if config.guidance == "sparse":
        pipeline.guider = guider or make_guider(config)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.to(device, torch.float32 if name == "vae" else getattr(torch, config.dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(scheduler, name: str | None, changes: dict[str, Any]):
    """The named scheduler, or one of the same class, with the settings of `scheduler` that it knows and the changes.

    Raises:
        ValueError: There is no such scheduler, or it has no such setting.
    """
    kind = type(scheduler)
    if name is not None:
        kind = SCHEDULERS.get(name) or getattr(diffusers, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ValueError(f"Expected a scheduler of diffusers or diffusers_tread in --scheduler, got {name!r}.")
    _check_settings(kind, changes, "--scheduler_config")
    return kind.from_config(scheduler.config, **changes)


def make_guider(config: SamplingConfig, **changes: Any) -> SparseGuidance:
    """Sparse Guidance as a config asks for it, with changes. Raises ValueError for a setting that it does not have."""
    names = ("guidance_scale", "strong_ratio", "weak_ratio")
    settings = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    settings |= read_json(config.guider_config or "{}") | changes
    _check_settings(SparseGuidance, settings, "--guider_config")
    return SparseGuidance(**settings)


def _check_settings(kind: type, settings: dict[str, Any], flag: str) -> None:
    if unknown := sorted(set(settings) - set(inspect.signature(kind.__init__).parameters)):
        raise ValueError(f"Expected settings of {kind.__name__} in {flag}, got {unknown}.")
