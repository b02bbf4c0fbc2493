# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sampling of a pipeline, for the scripts: flags, pipeline, scheduler, guider."""

import dataclasses
import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from ..files import find_pipeline
from ..guiders import SparseGuidance
from ..hooks import apply_token_routing
from ..hub_errors import ADVICE, LOST
from ..metrics import PipelineImages, PromptImages, load_dataset_prompts, read_prompts
from ..objectives import OBJECTIVES
from ..pipelines import GuidedPipeline, TREADPipeline
from ..pipelines.noise_levels import check_interval, steps_inside
from ..schedulers import SCHEDULERS
from ..text import LENGTHS
from .folder import SETTINGS as RUN_SETTINGS
from .parsing import check_at_least, check_types, read_json
from .sweep import SWEPT
from .text_config import DEFAULT_ROUTES


_GUIDER_FIELDS = ("guidance_scale", "guidance_interval", "guidance_rescale", "strong_ratio", "weak_ratio")
_GUIDER_FIELDS += ("guider_config",)
_GUIDANCE_FIELDS = {
    "pipeline": ("guidance_interval",),
    "none": (),
    "cfg": ("guidance_scale", "guidance_interval", "guidance_rescale"),
    "sparse": _GUIDER_FIELDS,
    "auto": _GUIDER_FIELDS,
}


_PROMPT_FIELDS = ("prompt_dataset_config_name", "prompt_dataset_split", "caption_column")
_PROMPT_FIELDS += ("height", "width", "call_options")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which pipeline is sampled, and how.

    Raises:
        ValueError: A field is out of its range, or the chosen guidance does not use it.
    """

    pretrained_pipeline: str | None = None
    """Folder of the pipeline or of its run, or a repository on the Hub: a TREADPipeline, or a text-to-image pipeline
    if there are prompts."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the transformers; the VAE stays in float32. With prompts, precision of all networks."""
    num_samples: int | None = None
    """Number of samples; None for 50,000, or for one per prompt."""
    seed: int = 0
    """Seed of the samples: sample i depends only on it and on i."""
    random_labels: bool = False
    """Draw classes at random, as ADM and DiT do, instead of one after the other."""
    prompts: str | None = None
    """Sample prompts instead of classes: a .txt file with one prompt per line, or a .jsonl, .csv or .parquet file."""
    prompt_dataset_name: str | None = None
    """Take prompts from a column of a `datasets` repository instead of a file."""
    prompt_dataset_config_name: str | None = None
    """Configuration of the prompts' data set; None if it has only one."""
    prompt_dataset_split: str = "train"
    """Split of the prompts' data set, such as validation or train[:5000]."""
    caption_column: str = "text"
    """Column of the prompts in a data set or a file."""
    height: int | None = None
    """Height of samples from prompts, in pixels; None for the pipeline's default."""
    width: int | None = None
    """Width of samples from prompts, in pixels; None for the pipeline's default."""
    call_options: str = "{}"
    """With prompts: more arguments of the pipeline's call as JSON, such as {"negative_prompt": "blurry"}."""
    num_inference_steps: int = 40
    """Steps of the sampler."""
    scheduler: str | None = None
    """Scheduler to sample with, a class of diffusers or diffusers_tread; None for the pipeline's."""
    scheduler_config: str = "{}"
    """Changes to the scheduler's settings as JSON, such as {"shift": 3.0}."""
    guidance: Literal["pipeline", "none", "cfg", "sparse", "auto"] = "pipeline"
    """pipeline: the guider saved with the pipeline; cfg: classifier-free; sparse: Sparse Guidance; auto: autoguidance
    by the pipeline's guidance_transformer, an earlier checkpoint."""
    guidance_transformer: str | None = None
    """For auto, and for sparse with weak_checkpoint: a TREADPipeline whose transformer is the guidance transformer;
    None for the one that was saved with the pipeline."""
    guidance_scale: float | None = None
    """Scale of cfg, sparse or auto. cfg needs it; for the others None is the default of SparseGuidance."""
    guidance_interval: str | None = None
    """Noise levels low,high between which guidance acts, such as 0.28,2.9, in the unit of the scheduler's sigmas:
    sigma of EDM, t in [0, 1] of flow matching, sqrt((1 - abar) / abar) of DDPM; None for all."""
    guidance_rescale: float | None = None
    """For cfg, sparse and auto: strength, in [0, 1], of the rescaling of arXiv 2305.08891."""
    strong_ratio: float | None = None
    """For sparse and auto: share of tokens, in [0, 1), routed away in the strong branch; None for the default of
    SparseGuidance, or 0 with auto."""
    weak_ratio: float | None = None
    """For sparse and auto: share of tokens routed away in the weak branch, likewise."""
    guider_config: str | None = None
    """More settings of SparseGuidance as JSON, such as {"stop": 0.8}: start and stop are shares of the model calls."""
    routes: str | None = None
    """For sparse with prompts: the routes that the pipeline was trained with, in the format of the training flag; None
    takes them from the run whose folder the pipeline is in."""

    def __post_init__(self):
        check_types(self, *SWEPT)
        check_at_least(self, 1, "num_samples", "num_inference_steps", "height", "width")
        self._check_guidance()
        self._check_prompts()

    @property
    def has_prompts(self) -> bool:
        """Whether the samples are made from prompts."""
        return self.prompts is not None or self.prompt_dataset_name is not None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The noise levels between which guidance acts. Raises ValueError if the text is not an interval."""
        if self.guidance_interval is None:
            return None
        try:
            low, high = (float(level) for level in self.guidance_interval.split(","))
        except ValueError as error:
            raise ValueError(
                f"Expected --guidance_interval low,high, such as 0.28,2.9, got {self.guidance_interval!r}."
            ) from error
        check_interval((low, high))
        return low, high

    def _check_guidance(self) -> None:
        given = {name for name in _GUIDER_FIELDS if getattr(self, name) is not None}
        if unused := sorted(given - set(_GUIDANCE_FIELDS[self.guidance])):
            raise ValueError(f"Expected only flags that --guidance {self.guidance} uses, got {unused}.")
        if self.guidance == "cfg" and self.guidance_scale is None:
            raise ValueError("Expected --guidance_scale with --guidance cfg, got none.")
        if self.guidance == "cfg" and not 0.0 <= (self.guidance_rescale or 0.0) <= 1.0:
            raise ValueError(f"Expected --guidance_rescale in [0, 1], got {self.guidance_rescale}.")
        if self.guidance_transformer is not None and self.guidance not in ("sparse", "auto"):
            raise ValueError("Expected --guidance_transformer with --guidance auto, or sparse with weak_checkpoint.")
        if self.routes is not None and not (self.has_prompts and self.guidance == "sparse"):
            raise ValueError("Expected --routes only with prompts and --guidance sparse: other pipelines know theirs.")
        if self.interval is not None and self.has_prompts and self.guidance != "sparse":
            raise ValueError("Expected --guidance_interval without prompts, or with --guidance sparse.")

    def _check_prompts(self) -> None:
        if self.prompts is not None and self.prompt_dataset_name is not None:
            raise ValueError("Expected either --prompts or --prompt_dataset_name, got both.")
        defaults = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}
        given = [name for name in _PROMPT_FIELDS if getattr(self, name) != defaults[name]]
        if given and not self.has_prompts:
            raise ValueError(f"Expected {given} only with --prompts or --prompt_dataset_name. Leave them out.")
        if self.has_prompts and self.random_labels:
            raise ValueError("Expected prompts without --random_labels, got both.")
        if self.has_prompts and (self.guidance == "auto" or self.guidance_transformer is not None):
            raise ValueError("Expected prompts without --guidance auto and --guidance_transformer, got one of these.")
        if self.has_prompts and self.guidance == "cfg" and self.guidance_rescale is not None:
            raise ValueError(
                "Expected prompts with cfg without --guidance_rescale, got both. Where the pipeline takes it, use "
                "--call_options '{\"guidance_rescale\": 0.7}'."
            )


def open_pipeline_images(
    config: SamplingConfig,
    device: torch.device,
    *,
    guider: SparseGuidance | None = None,
    cache_dir: str | None = None,
) -> PipelineImages | PromptImages:
    """Makes the samples that a config describes, see `load_pipeline` and `load_text_pipeline`.

    Args:
        config: The sampling config.
        device: Device of the networks.
        guider: Replaces the guider of the config; without prompts only.
        cache_dir: Where a downloaded data set of prompts is kept; None for the cache of `datasets`.
    """
    # From prompts.
    scale = {"none": 1.0, "cfg": config.guidance_scale}.get(config.guidance)
    common = {"num_inference_steps": config.num_inference_steps, "guidance_scale": scale, "seed": config.seed}
    if config.has_prompts:
        prompts = load_prompts(config, cache_dir=cache_dir)
        pipeline = load_text_pipeline(config, device)
        common |= {"height": config.height, "width": config.width, "call_options": find_call_options(config, pipeline)}
        if config.guidance == "sparse":
            pipeline = guide_text_pipeline(pipeline, config)
        return PromptImages(pipeline, prompts, num_images=config.num_samples, **common)

    # From classes.
    rescale = config.guidance_rescale if config.guidance == "cfg" else None  # a guider has its own
    return PipelineImages(
        load_pipeline(config, device, guider=guider),
        num_images=config.num_samples or 50_000,
        random_labels=config.random_labels,
        guidance_interval=config.interval,
        guidance_rescale=rescale or 0.0,
        **common,
    )


def load_prompts(config: SamplingConfig, *, cache_dir: str | None = None) -> list[str]:
    """Loads the prompts that a config names, and warns if there are fewer prompts than samples."""
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
    """Loads a text-to-image pipeline of diffusers with the config's scheduler.

    Weights are read from safetensors only, and no code from a repository is executed.

    Raises:
        ValueError: There is no such pipeline; the scheduler refuses a setting or is for other objectives.
    """
    # Load, without code from the repository. `torch_dtype` is the name in old releases; newer ones warn about it.
    dtype = getattr(torch, config.dtype)
    try:
        folder = find_pipeline(config.pretrained_pipeline)
        if not Path(folder).is_dir():
            folder = diffusers.DiffusionPipeline.download(folder, revision=config.revision, use_safetensors=True)
        _check_no_code(folder)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (ValueError, AttributeError, *LOST) as error:  # AttributeError: a class that diffusers does not have
        raise ValueError(
            "Expected a text-to-image pipeline of diffusers with safetensors in --pretrained_pipeline, got "
            f"{config.pretrained_pipeline} ({error}). A TREADPipeline is evaluated without prompts. {ADVICE}"
        ) from error

    # Replace the scheduler only by one for models of the same objective.
    pipeline.scheduler = _make_similar_scheduler(pipeline.scheduler, config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def guide_text_pipeline(pipeline: diffusers.DiffusionPipeline, config: SamplingConfig) -> GuidedPipeline:
    """Adds Sparse Guidance, on the routes of its training, to a text-to-image pipeline.

    Raises:
        ValueError: The routes are not known, or the pipeline does not support Sparse Guidance.
    """
    routes = config.routes or read_run_settings(config.pretrained_pipeline).get("routes", "unknown")
    if routes in ("unknown", "none"):
        raise ValueError(
            f"Expected --routes, those that the pipeline was trained with, such as '{DEFAULT_ROUTES}', got "
            f"{'none' if routes == 'unknown' else repr(routes)}. Only a pipeline in the folder of its run tells them."
        )
    apply_token_routing(pipeline.transformer, json.loads(DEFAULT_ROUTES if routes in (None, "default") else routes))
    return GuidedPipeline(pipeline, make_guider(config), guidance_interval=config.interval)


def find_call_options(config: SamplingConfig, pipeline: diffusers.DiffusionPipeline) -> dict[str, Any]:
    """More arguments of a text-to-image pipeline's call: those of its training, overridden by the config.

    If the pipeline is in the folder of its run, captions are so encoded as in that run.
    """
    run, parameters = read_run_settings(config.pretrained_pipeline), inspect.signature(pipeline.__call__).parameters
    trained = read_json(run.get("call_options") or "{}")
    if run.get("max_sequence_length") is not None:
        trained |= {name: run["max_sequence_length"] for name in LENGTHS if name in parameters}
    given = read_json(config.call_options)
    # Arguments with flags of their own are left to these flags.
    trained = {name: value for name, value in trained.items() if name not in given and name != "guidance_scale"}
    if trained:
        logger.warning(f"Called with {trained}, as in training. Other values are said by --call_options.")
    return trained | given


def read_run_settings(pretrained_pipeline: str) -> dict[str, Any]:
    """The settings of the run whose folder a pipeline is in; empty if it is not in one."""
    path = Path(pretrained_pipeline).resolve().parent / RUN_SETTINGS
    return read_json(str(path)) if path.is_file() else {}


def load_pipeline(
    config: SamplingConfig, device: torch.device, *, guider: SparseGuidance | None = None
) -> TREADPipeline:
    """Loads a TREADPipeline with the config's scheduler and guider.

    Args:
        config: The sampling config.
        device: Device of the networks.
        guider: Replaces the guider of the config.

    Raises:
        ValueError: There is no pipeline; the pipeline, the scheduler or the guider refuses a setting.
    """
    # Load, with the scheduler.
    try:
        pipeline = TREADPipeline.from_pretrained(find_pipeline(config.pretrained_pipeline), revision=config.revision)
    except LOST as error:
        raise ValueError(
            f"Expected a TREADPipeline in --pretrained_pipeline, got {config.pretrained_pipeline} ({error}). {ADVICE}"
        ) from error
    pipeline.scheduler = make_scheduler(pipeline.scheduler, config.scheduler, read_json(config.scheduler_config))

    # Guider.
    if config.guidance in ("sparse", "auto"):
        if config.guidance_transformer is not None:
            earlier = TREADPipeline.from_pretrained(find_pipeline(config.guidance_transformer))
            pipeline.guidance_transformer = earlier.transformer
        pipeline.guider = guider or make_guider(config)
        pipeline.guider.check_denoisers(pipeline.transformer, pipeline.guidance_transformer)

    # Device and precision.
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.to(device, torch.float32 if name == "vae" else getattr(torch, config.dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_no_code(folder: str | Path) -> None:
    """Raises ValueError if loading the folder would execute code in it, which diffusers 0.36 does without asking."""
    parts = diffusers.DiffusionPipeline.load_config(folder)
    pipeline_class = parts.pop("_class_name")
    libraries = {name: value[0] for name, value in parts.items() if isinstance(value, list) and len(value) == 2}
    code = [
        f"{name}/{library}.py" for name, library in libraries.items() if Path(folder, name, f"{library}.py").exists()
    ]
    if code or not isinstance(pipeline_class, str):
        raise ValueError(f"it has code of its own: {code or pipeline_class}")


def make_scheduler(scheduler, name: str | None, changes: dict[str, Any]):
    """Makes a scheduler with the settings of another one, as far as it knows them, and with changes.

    Args:
        scheduler: The scheduler whose settings are taken.
        name: Class of the new scheduler; None for the same class.
        changes: Settings that override those of `scheduler`.

    Raises:
        ValueError: There is no such scheduler, or it has no such setting.
    """
    kind = type(scheduler)
    if name is not None:
        kind = _scheduler_class(name)
        if kind is None:
            raise ValueError(f"Expected a scheduler of diffusers or diffusers_tread in --scheduler, got {name!r}.")
    _check_settings(kind, changes, "--scheduler_config")
    return kind.from_config(scheduler.config, **changes)


def check_scheduler_settings(config: SamplingConfig) -> None:
    """Checks how a config samples by its pipeline's saved scheduler alone, if there is one, before anything is loaded.

    Raises:
        ValueError: What `make_scheduler` refuses; a scheduler for other models; without prompts an interval that no
            step lies in.
    """
    try:
        saved = diffusers.DDIMScheduler.load_config(
            find_pipeline(config.pretrained_pipeline), subfolder="scheduler", revision=config.revision
        )
    except (ValueError, *LOST):
        return  # of which loading tells more
    kind = _scheduler_class(saved.get("_class_name", ""))
    if kind is None:
        return
    scheduler = _make_similar_scheduler(kind.from_config(saved), config)
    if config.interval is not None and not config.has_prompts:
        scheduler.set_timesteps(config.num_inference_steps)
        steps_inside(scheduler, config.interval)


def _make_similar_scheduler(saved, config: SamplingConfig):
    """As `make_scheduler`, one that samples from models of the same objective."""
    scheduler = make_scheduler(saved, config.scheduler, read_json(config.scheduler_config))
    objectives = [kind for kind in OBJECTIVES.values() if kind.accepts(saved)]
    if objectives and not any(kind.accepts(scheduler) for kind in objectives):
        raise ValueError(
            f"Expected a scheduler for models that {type(saved).__name__} samples from, got "
            f"{type(scheduler).__name__}. Use one of the same kind."
        )
    return scheduler


def _scheduler_class(name: str) -> Any:
    kind = SCHEDULERS.get(name) or getattr(diffusers, name, None)
    return kind if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin) else None


def make_guider(config: SamplingConfig, **changes: Any) -> SparseGuidance:
    """Makes the guider of a config with --guidance sparse or auto; `changes` override its settings.

    Raises:
        ValueError: A setting is unknown or out of its range.
    """
    names = ("guidance_scale", "guidance_rescale", "strong_ratio", "weak_ratio")
    settings = {"weak_checkpoint": True, "strong_ratio": 0.0, "weak_ratio": 0.0} if config.guidance == "auto" else {}
    settings |= {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    settings |= read_json(config.guider_config or "{}") | changes
    _check_settings(SparseGuidance, settings, "--guider_config")
    return SparseGuidance(**settings)


def _check_settings(kind: type, settings: dict[str, Any], flag: str) -> None:
    if unknown := sorted(set(settings) - set(inspect.signature(kind.__init__).parameters)):
        raise ValueError(f"Expected settings of {kind.__name__} in {flag}, got {unknown}.")
