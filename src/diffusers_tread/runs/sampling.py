# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How a pipeline is sampled, for the scripts that do: flags, pipeline, scheduler, guider."""

import dataclasses
import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from ..files import find_pipeline
from ..guiders import SparseGuidance
from ..metrics import PipelineImages, PromptImages, load_dataset_prompts, read_prompts
from ..objectives import OBJECTIVES
from ..pipelines import TREADPipeline
from ..schedulers import SCHEDULERS
from .parsing import check_at_least, read_json


_GUIDANCE_FIELDS = {
    "pipeline": (),
    "none": (),
    "cfg": ("guidance_scale",),
    "sparse": ("guidance_scale", "strong_ratio", "weak_ratio", "guider_config"),
}


_PROMPT_FIELDS = ("prompt_dataset_config_name", "prompt_dataset_split", "caption_column")
_PROMPT_FIELDS += ("height", "width", "call_options")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A pipeline and how it is sampled.

    Raises:
        ValueError: A field is out of its range, or the guidance has no use for it.
    """

    pretrained_pipeline: str | None = None
    """Its or its run's folder, or a repository on the Hub: a TREADPipeline, with prompts a text-to-image pipeline."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the transformers; the VAE stays in float32. With prompts, of all networks."""
    num_samples: int | None = None
    """Samples of the pipeline; None for 50,000, or for one per prompt."""
    seed: int = 0
    """Sample i follows from this and i."""
    random_labels: bool = False
    """Draw classes at random, as ADM and DiT do, instead of one after the other."""
    prompts: str | None = None
    """Instead of classes: a .txt file with a prompt per line, or a .jsonl, .csv or .parquet file of rows."""
    prompt_dataset_name: str | None = None
    """Instead of a file: a `datasets` repository with a column of prompts."""
    prompt_dataset_config_name: str | None = None
    """Its configuration; None for its only one."""
    prompt_dataset_split: str = "train"
    """Its split, such as validation or train[:5000]."""
    caption_column: str = "text"
    """Column of the prompts in a data set or a file."""
    height: int | None = None
    """Of prompts' samples, in pixels; None for the pipeline's default."""
    width: int | None = None
    """Likewise."""
    call_options: str = "{}"
    """With prompts: more arguments of the pipeline's call as JSON, such as {"negative_prompt": "blurry"}."""
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
        check_at_least(self, 1, "num_samples", "num_inference_steps", "height", "width")
        given = {name for name in _GUIDANCE_FIELDS["sparse"] if getattr(self, name) is not None}
        if unused := sorted(given - set(_GUIDANCE_FIELDS[self.guidance])):
            raise ValueError(f"Expected only flags that --guidance {self.guidance} uses, got {unused}.")
        self._check_scale()
        self._check_prompts()

    @property
    def has_prompts(self) -> bool:
        """Whether the pipeline makes images of prompts."""
        return self.prompts is not None or self.prompt_dataset_name is not None

    def _check_scale(self) -> None:
        if self.guidance == "cfg" and self.guidance_scale is None:
            raise ValueError("Expected --guidance_scale with --guidance cfg, got none.")

    def _check_prompts(self) -> None:
        if self.prompts is not None and self.prompt_dataset_name is not None:
            raise ValueError("Expected either --prompts or --prompt_dataset_name, got both.")
        defaults = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}
        given = [name for name in _PROMPT_FIELDS if getattr(self, name) != defaults[name]]
        if given and not self.has_prompts:
            raise ValueError(f"Expected {given} only with --prompts or --prompt_dataset_name. Leave them out.")
        if self.has_prompts and (self.random_labels or self.guidance == "sparse"):
            raise ValueError("Expected prompts without --random_labels and --guidance sparse, got one of these.")


def open_pipeline_images(
    config: SamplingConfig,
    device: torch.device,
    *,
    guider: SparseGuidance | None = None,
    cache_dir: str | None = None,
) -> PipelineImages | PromptImages:
    """The samples that a config asks for, see `load_pipeline` and `load_text_pipeline`.

    Args:
        config: Of the samples.
        device: Of the networks.
        guider: Instead of the one that the config asks for.
        cache_dir: Where a downloaded data set of prompts is kept; None for the cache of `datasets`.
    """
    scale = {"none": 1.0, "cfg": config.guidance_scale}.get(config.guidance)
    common = {"num_inference_steps": config.num_inference_steps, "guidance_scale": scale, "seed": config.seed}
    if config.has_prompts:
        prompts = load_prompts(config, cache_dir=cache_dir)
        common |= {"height": config.height, "width": config.width, "call_options": read_json(config.call_options)}
        pipeline = load_text_pipeline(config, device)
        return PromptImages(pipeline, prompts, num_images=config.num_samples, **common)
    return PipelineImages(
        load_pipeline(config, device, guider=guider),
        num_images=config.num_samples or 50_000,
        random_labels=config.random_labels,
        **common,
    )


def load_prompts(config: SamplingConfig, *, cache_dir: str | None = None) -> list[str]:
    """The prompts that a config names; says so if they are fewer than the samples."""
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, caption_column=config.caption_column)
    else:
        prompts = load_dataset_prompts(
            config.prompt_dataset_name,
            dataset_config_name=config.prompt_dataset_config_name,
            split=config.prompt_dataset_split,
            caption_column=config.caption_column,
            cache_dir=cache_dir,
        )
    if config.num_samples is not None and config.num_samples > len(prompts):
        logger.warning(f"{config.num_samples} samples of {len(prompts)} prompts: the prompts are taken in turns.")
    return prompts


def load_text_pipeline(config: SamplingConfig, device: torch.device) -> diffusers.DiffusionPipeline:
    """A text-to-image pipeline of diffusers with the scheduler that a config asks for.

    Weights are read from safetensors only, and no code of a repository is executed.

    Raises:
        ValueError: There is no such pipeline; the scheduler refuses a setting, or samples from other models.
    """
    dtype = getattr(torch, config.dtype)  # by the name that the oldest release knows, of which newer ones warn
    try:
        folder = find_pipeline(config.pretrained_pipeline)
        if not Path(folder).is_dir():
            folder = diffusers.DiffusionPipeline.download(folder, revision=config.revision, use_safetensors=True)
        _check_no_code(folder)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: a class that diffusers does not have
        raise ValueError(
            "Expected a text-to-image pipeline of diffusers with safetensors in --pretrained_pipeline, got "
            f"{config.pretrained_pipeline} ({error}). A TREADPipeline is evaluated without prompts."
        ) from error

    # Schedulers that sample from models of the same objective.
    saved = pipeline.scheduler
    pipeline.scheduler = make_scheduler(saved, config.scheduler, read_json(config.scheduler_config))
    objectives = [kind for kind in OBJECTIVES.values() if kind.accepts(saved)]
    if objectives and not any(kind.accepts(pipeline.scheduler) for kind in objectives):
        raise ValueError(
            f"Expected a scheduler for models that {type(saved).__name__} samples from, got "
            f"{type(pipeline.scheduler).__name__}. Use one of the same kind."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


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
        pipeline = TREADPipeline.from_pretrained(find_pipeline(config.pretrained_pipeline), revision=config.revision)
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


def _check_no_code(folder: str | Path) -> None:
    """Raises ValueError if loading a pipeline's folder executes code of it, which diffusers 0.36 does unasked."""
    parts = diffusers.DiffusionPipeline.load_config(folder)
    pipeline_class = parts.pop("_class_name")
    libraries = {name: value[0] for name, value in parts.items() if isinstance(value, list) and len(value) == 2}
    code = [
        f"{name}/{library}.py" for name, library in libraries.items() if Path(folder, name, f"{library}.py").exists()
    ]
    if code or not isinstance(pipeline_class, str):
        raise ValueError(f"it has code of its own: {code or pipeline_class}")


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
