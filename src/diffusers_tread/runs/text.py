# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a text-to-image run sets up from its config, and the outputs it makes from its weights."""

import copy
import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import DiffusionPipeline

from ..data import TrainingSource, open_source
from ..flops import block_flops_saved, training_flops
from ..hooks import apply_token_routing
from ..hub import export_text_pipeline
from ..metrics import PromptImages
from ..pictures import caption_grid
from ..routing import TokenRoute
from ..seeds import derive_seed
from ..text import (
    LENGTHS,
    PipelineDenoiser,
    PromptEncoder,
    load_pipeline,
    make_transformer,
    save_pipeline,
    text_identity,
)
from . import setup
from .ema import whole_weights
from .optimizers import make_optimizer
from .outputs import RunOutputs
from .parsing import read_json
from .text_config import DEFAULT_ROUTES, TextTrainConfig


logger = logging.getLogger(__name__)
_COUNTED = 10_000  # captions whose length is checked before the run
FROZEN_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def open_pipeline(
    config: TextTrainConfig, accelerator: Accelerator, *, transformer_dtype: torch.dtype = torch.float32
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Loads the pipeline to train, with a pretrained transformer or a new one, initialised equally in every process.

    Its other parts are frozen and on the device. The text encoders are loaded in the run's precision; the transformer
    is in `transformer_dtype`, float32 by default, whatever the run's precision.

    Returns:
        The pipeline, and the identity of its text encoders (JSON).

    Raises:
        ValueError: As for `make_transformer` and `load_pipeline`.
    """
    # Load.
    values = config.transformer_values()
    torch.manual_seed(derive_seed(config.seed, "init"))
    transformer = None if values is None else make_transformer(values)
    frozen_dtype = FROZEN_DTYPES.get(accelerator.mixed_precision, torch.float32)
    dtypes = {"transformer": transformer_dtype, "vae": torch.float32, "default": frozen_dtype}
    with accelerator.main_process_first():  # one process fills the caches
        pipeline = load_pipeline(
            config.pretrained_model_name_or_path,
            transformer=transformer,
            parts=read_json(config.parts),
            scheduler=setup.make_objective(config, None).scheduler(),
            dtypes=dtypes,
        )

    # Default size of samples (PRX only).
    if transformer is not None and "default_sample_size" in pipeline.config and config.resolution:
        pipeline.register_to_config(default_sample_size=config.resolution)
        pipeline.default_sample_size = config.resolution

    # Freeze all parts but the transformer.
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(part is pipeline.transformer).eval()
            torch.nn.Module.to(part, accelerator.device)  # diffusers' `to` may warn about an empty list
    return pipeline, text_identity(pipeline, **encoding_options(config))


def encoding_options(config: TextTrainConfig) -> dict[str, Any]:
    """How a run encodes captions, in training and for its samples."""
    return {"max_sequence_length": config.max_sequence_length, "call_options": read_json(config.call_options)}


def route_transformer(config: TextTrainConfig, transformer: torch.nn.Module) -> list[TokenRoute]:
    """Applies --routes to a transformer. Raises ValueError if that is not possible."""
    routes = DEFAULT_ROUTES if config.routes in (None, "default") else config.routes
    return [] if routes == "none" else list(apply_token_routing(transformer, json.loads(routes)).routes)


def open_data(
    config: TextTrainConfig, encoder: PromptEncoder, text: dict[str, Any], accelerator: Accelerator
) -> TrainingSource:
    """Opens images with captions, to be encoded by the pipeline's VAE, and prints how many captions are too long.

    Raises:
        ValueError: The data have no captions, or their stored text was encoded by another encoder.
    """
    # Open.
    if config.data == "digits:":
        raise ValueError("Expected --data with captions, such as folder:PATH or hub:NAME, got 'digits:', the default.")
    vae = encoder.pipeline.components.get("vae")
    with accelerator.main_process_first():
        source = open_source(config.data, pretrained_vae_name_or_path=vae, **config.data_options())
    if not source.has_captions:
        raise ValueError(f"Expected data with captions, got {config.data}. See --caption_column.")

    # Check the text.
    if source.info is not None and source.info.text is not None:
        source.info.text.check_encoder(text)
    elif hasattr(source.dataset, "first_captions"):  # not a stream
        captions = source.dataset.first_captions(_COUNTED)
        if cut := encoder.count_too_long(captions):
            accelerator.print(
                f"{cut} of the first {len(captions)} captions are longer than the text encoders read and lose their "
                "end. --max_sequence_length may be raised where the pipeline allows it."
            )
    return source


def make_denoiser(
    config: TextTrainConfig, encoder: PromptEncoder, source: TrainingSource, accelerator: Accelerator
) -> PipelineDenoiser:
    """Wraps the pipeline as a denoiser to train. Raises ValueError if its parts do not fit each other or the data."""
    factor, text = source.resolution // source.latent_size, encoder([""])
    shape, *others = [(source.channels, *(side // factor for side in size)) for size in sorted(source.sizes)[::-1]]
    with accelerator.autocast():  # for the trial calls
        denoiser = PipelineDenoiser(
            encoder.pipeline,
            latents_shape=shape,
            text=text,
            pixels_per_latent=factor,
            call_options=read_json(config.call_options),
        )
        for other in others:
            denoiser.try_shape(other, text)
    return denoiser


def text_conditions(
    config: TextTrainConfig,
    encoder: PromptEncoder,
    source: TrainingSource,
    batch: dict[str, Any],
    generator: torch.Generator,
) -> dict[str, Any]:
    """The encoded captions of a batch, from the pipeline's encoders or as stored. A share of them is made empty."""
    told = source.conditions(batch)
    captions, stored = told["captions"], told.get("text")
    dropped = (torch.rand(len(captions), generator=generator) < config.proportion_empty_prompts).tolist()
    if stored is None:
        return {"text": encoder(["" if drop else one for one, drop in zip(captions, dropped, strict=True)])}
    samples = [source.empty_text if drop else one for one, drop in zip(stored, dropped, strict=True)]
    return {"text": encoder.collate(samples, device=encoder.pipeline.device)}


def count_flops(denoiser: PipelineDenoiser, *, is_routed: bool) -> tuple[dict[bool, int] | None, float | None]:
    """Counts the FLOPs of training one sample, routed (True) and dense (False).

    Returns:
        These FLOPs, and the share of the blocks' FLOPs that routing saves. Both are None, after a warning, if they
        cannot be counted because the transformer's forward depends on values of tensors.
    """
    try:
        dense = training_flops(denoiser.transformer, denoiser.inputs, selection_ratio=0.0 if is_routed else None)
        if not is_routed:
            return {True: dense, False: dense}, 0.0
        routed = training_flops(denoiser.transformer, denoiser.inputs)
        return {True: routed, False: dense}, block_flops_saved(denoiser.transformer, denoiser.inputs)
    except ValueError as error:
        logger.warning(f"The log says nothing of FLOPs: {error}")
        return None, None


def describe_run(
    config: TextTrainConfig,
    accelerator: Accelerator,
    source: TrainingSource,
    pipeline: DiffusionPipeline,
    text: dict[str, Any],
    flops_saved: float | None,
) -> dict[str, Any]:
    """Everything the run depends on (JSON). Raises ValueError if the optimiser does not fit the model."""
    make_optimizer(config, pipeline.transformer)
    model = json.loads(pipeline.transformer.to_json_string())
    return setup.common_settings(config, accelerator, source) | {
        "pipeline_class": type(pipeline).__name__,
        "model_class": type(pipeline.transformer).__name__,
        "model": {key: value for key, value in model.items() if key[0] != "_"},
        "num_parameters": sum(one.numel() for one in pipeline.transformer.parameters() if one.requires_grad),
        "block_flops_saved": flops_saved,
        "text": text,
    }


def describe_text(
    config: TextTrainConfig, source: TrainingSource, settings: dict[str, Any], routes: list[TokenRoute]
) -> dict[str, list[Any]]:
    """The rows of `settings_table` that are specific to text-to-image runs."""
    sizes = [f"{height}x{width}" for height, width in source.sizes]
    return {
        "sees": [" or ".join(sizes[:4]) + ("" if len(sizes) < 5 else f" or {len(sizes) - 4} other sizes"), "captions"],
        "model": [settings["model_class"], settings["pipeline_class"], config.preset],
        "routes": setup.describe_routes(routes),
        "objective": [config.objective, *([config.objective_config] if config.objective_config != "{}" else [])],
    }


class TextOutputs(RunOutputs):
    """Outputs of a text-to-image run, whose pipelines are those of diffusers, see `RunOutputs`.

    Args:
        *args: As for `RunOutputs`.
        pipeline: The pipeline that is trained.
        make_transformer: Makes its transformer without weights. Trained weights come from the run; frozen ones are
            taken from `pipeline`.
        **options: As for `RunOutputs`.
    """

    export = staticmethod(export_text_pipeline)

    def __init__(
        self, *args: Any, pipeline: DiffusionPipeline, make_transformer: Callable[[], torch.nn.Module], **options: Any
    ):
        super().__init__(*args, **options)
        self.pipeline, self.make_transformer = pipeline, make_transformer

    @property
    def image_size(self) -> tuple[int, int]:
        return self.source.sizes[0]  # the first bucket

    @property
    def sampled(self) -> dict[str, Any]:
        prompts = json.dumps(self.config.prompts("eval_prompts"))
        return {"prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest()}

    def make_pipeline(self) -> DiffusionPipeline:
        # A transformer with the trained and the frozen weights.
        with init_empty_weights():
            transformer = self.make_transformer()
        device, trained = self.accelerator.device, whole_weights(self.weights, self.names, device="cpu")
        weights = {name.removeprefix("transformer."): weight for name, weight in trained.items()}
        for name, parameter in self.pipeline.transformer.named_parameters():
            if not parameter.requires_grad:
                weights[name] = parameter.detach()
        left_out = transformer.load_state_dict(weights, strict=False, assign=True)
        buffers = {name for name, _ in transformer.named_buffers()}
        if left_out.unexpected_keys or set(left_out.missing_keys) - buffers:
            raise ValueError(f"Expected all weights of {type(transformer).__name__}, got others: {left_out}.")

        # The pipeline with this transformer.
        pipeline = copy.copy(self.pipeline)
        pipeline.transformer = transformer.requires_grad_(False).eval().to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def make_grid(self, pipeline: DiffusionPipeline) -> PIL.Image.Image:
        config = self.config
        prompts = config.prompts("validation_prompts")
        prompts = [prompts[index % len(prompts)] for index in range(config.num_validation_images)]
        sampling = {"num_inference_steps": config.validation_inference_steps, "seed": config.seed}
        images = self._images(pipeline, prompts, guidance_scale=config.validation_guidance_scale, **sampling)
        pixels = torch.cat([images.read(index, index + 1) for index in range(len(prompts))])
        pictures = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels.cpu()]
        return caption_grid(pictures, prompts)

    def make_samples(self, pipeline: DiffusionPipeline) -> PromptImages:
        options = {"num_images": self.config.eval_num_samples, **self.sampling}
        return self._images(pipeline, self.config.prompts("eval_prompts"), **options)

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        save_pipeline(pipeline, folder)

    def _images(self, pipeline: DiffusionPipeline, prompts: list[str], **options: Any) -> PromptImages:
        height, width = self.image_size
        parameters = inspect.signature(type(pipeline).__call__).parameters
        call_options = {"use_resolution_binning": False} if "use_resolution_binning" in parameters else {}
        for name in LENGTHS:
            if name in parameters and self.config.max_sequence_length is not None:
                call_options[name] = self.config.max_sequence_length
        call_options |= read_json(self.config.call_options)
        options["guidance_scale"] = call_options.pop("guidance_scale", options["guidance_scale"])
        options |= {"height": height, "width": width, "call_options": call_options}
        images = PromptImages(pipeline, prompts, **options)
        images.read = self.accelerator.autocast()(images.read)
        return images
