# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Class-conditional sampling with EDM or flow schedulers, classifier-free guidance or any diffusers guider.

Shapes: B images (labels x images per label), C latent channels, H and W latent size.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional, overload

import numpy as np
import torch
from diffusers import BaseGuidance, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor

from ..data.latents.codec import decode_latents, spatial_compression
from ..hub import HubPipeline
from .compatibility import (
    check_can_sample,
    check_channels,
    check_finite_samples,
    check_guidance_transformer,
    check_no_dropout,
    check_scheduler,
    check_sigmas,
)
from .guided_prediction import GuidedPrediction
from .noise_levels import check_interval, steps_inside


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .call_types import ArrayOutput, CallOptions, Labels, PILOutput, TensorOutput


# Sana's mixin has the LoRA methods for pipelines that adapt only the transformer; nothing in it is specific to Sana.
class TREADPipeline(HubPipeline, SanaLoraLoaderMixin):
    r"""Samples images of given classes from a denoiser.

    Args:
        transformer: The denoiser, such as a `TREADTransformer2DModel`: of this package, registered by
            `register_denoiser`, or from code on the Hub. It may be shared with other pipelines, threads and a training
            loop: it is not changed, and sampling uses evaluation-mode routing whatever mode it is in. The exceptions
            are diffusers' caches, and guiders that hook the model (`SkipLayerGuidance`, `PerturbedAttentionGuidance`):
            they keep their state in the model, so only one thread at a time may sample from it.
        scheduler: Any diffusers scheduler of the kind that the transformer was trained for: EDM (`EDMHeunScheduler`,
            `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`) or flow matching (`FlowMatchEulerDiscreteScheduler`,
            `FlowMatchHeunDiscreteScheduler`, or a solver with `prediction_type="flow_prediction"` and
            `use_flow_sigmas=True`; also for JiT models), or DDPM's noise prediction (`DDIMScheduler` and others with
            `prediction_type="epsilon"`).
        vae: Decodes latents to images; None for a model of pixels.
        guider: `SparseGuidance` or any other diffusers guider that needs only the class labels. None for plain
            classifier-free guidance by `guidance_scale`.
        guidance_transformer: An earlier checkpoint, or another worse model of the same data, for the weak branch of
            `SparseGuidance(weak_checkpoint=True)`; not run otherwise.
        id2label: Class id to name; integer keys become strings, as in JSON. A value may hold several names, separated
            by commas, as ImageNet's do.

    Raises:
        ValueError: The scheduler does not match the transformer's objective, or cannot sample with its settings; the
            VAE does not match the transformer's channels; or the guidance transformer does not match the
            transformer's channels, patch size, classes or objective.

    Example:
        >>> from diffusers_tread import EDMHeunScheduler, SparseGuidance, TREADPipeline, TREADTransformer2DModel
        >>> transformer = TREADTransformer2DModel(num_layers=6, sample_size=8, in_channels=3, num_classes=10)
        >>> pipe = TREADPipeline(transformer, EDMHeunScheduler(), guider=SparseGuidance())
        >>> pipe(class_labels=[1, 7], num_inference_steps=2).images[0].size
        (8, 8)
    """

    # Without the guidance transformer: it alternates with the transformer, and each would evict the other.
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "guider", "guidance_transformer"]
    # "prompt_embeds" is another name for the labels, for diffusers' callbacks that ask for it.
    _callback_tensor_inputs = ["latents", "class_labels", "prompt_embeds"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: Optional[ModelMixin] = None,  # noqa: UP045 - diffusers 0.36 does not read `X | None`
        guider: Optional[BaseGuidance] = None,  # noqa: UP045
        guidance_transformer: Optional[ModelMixin] = None,  # noqa: UP045
        id2label: Optional[dict[Any, str]] = None,  # noqa: UP045
    ):
        # Checks and components.
        super().__init__()
        check_scheduler(scheduler, transformer)
        check_channels(transformer, vae)
        check_guidance_transformer(transformer, guidance_transformer)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            guider=guider,
            guidance_transformer=guidance_transformer,
        )
        id2label = None if id2label is None else {str(index): name for index, name in id2label.items()}
        self.register_to_config(id2label=id2label)

        # State of a call.
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.set_progress_bar_config(desc="Sampling")
        self._guidance_scale = None
        self._num_timesteps = 0
        self._guided_steps: list[int] = []
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "TREADPipeline":
        """A new pipeline with the components of `pipeline`, replaced by those in `kwargs`.

        Unlike diffusers' own method, which casts all models to float32, it keeps their dtypes, and all models.
        """
        parts = pipeline.components | {"id2label": pipeline.config.get("id2label")}
        names = inspect.signature(cls.__init__).parameters
        return cls(**{name: part for name, part in parts.items() if name in names} | kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            check_can_sample(value)
        super().__setattr__(name, value)
        # diffusers does not save a component that replaced None: its `__setattr__` leaves the entry (None, None).
        # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/pipeline_utils.py
        if name in self._optional_components and value is not None and self.config[name][0] is None:
            self.register_modules(**{name: value})

    @property
    def vae_scale_factor(self) -> int:
        """Side of a latent pixel in image pixels."""
        return 1 if self.vae is None else spatial_compression(self.vae)

    @property
    def guidance_scale(self) -> float | None:
        """Scale of the classifier-free guidance in the current or last call; None without, or with a guider."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Model evaluations per branch in the current or last call (2N - 1 for the N steps of Heun's method)."""
        return self._num_timesteps

    @property
    def guided_steps(self) -> list[int]:
        """Indices of the model evaluations, 0-based, inside the current or last call's `guidance_interval`; all if it
        is None."""
        return self._guided_steps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the remaining steps."""
        return self._interrupt

    if TYPE_CHECKING:

        @property
        def config(self) -> Any: ...

        @overload
        def __call__(
            self,
            class_labels: Labels,
            *,
            output_type: Literal["pil"] = "pil",
            return_dict: Literal[True] = True,
            **options: Unpack[CallOptions],
        ) -> PILOutput: ...
        @overload
        def __call__(
            self,
            class_labels: Labels,
            *,
            output_type: Literal["np"],
            return_dict: Literal[True] = True,
            **options: Unpack[CallOptions],
        ) -> ArrayOutput: ...
        @overload
        def __call__(
            self,
            class_labels: Labels,
            *,
            output_type: Literal["pt", "latent"],
            return_dict: Literal[True] = True,
            **options: Unpack[CallOptions],
        ) -> TensorOutput: ...
        @overload
        def __call__(
            self,
            class_labels: Labels,
            *,
            output_type: str = "pil",
            return_dict: Literal[False],
            **options: Unpack[CallOptions],
        ) -> tuple[Any]: ...
        @overload
        def __call__(
            self,
            class_labels: Labels,
            *,
            output_type: str,
            return_dict: bool = True,
            **options: Unpack[CallOptions],
        ) -> Any: ...

    @torch.no_grad()
    def __call__(
        self,
        class_labels: "int | str | Sequence[int | str] | torch.Tensor",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 40,
        sigmas: "Sequence[float] | np.ndarray | None" = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: "torch.Generator | list[torch.Generator] | None" = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["TREADPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
    ) -> "ImagePipelineOutput | tuple":
        r"""Generates images.

        Args:
            class_labels: Class ids in [0, num_classes), the null class `num_classes`, or names of `id2label`; one or
                several.
            height: Height of the image in pixels; None for the training size.
            width: Width of the image in pixels; None for the training size.
            num_inference_steps: Steps N of the sampler; Heun's method calls the model 2N - 1 times.
            sigmas: The N noise levels to use instead of the scheduler's own, strictly decreasing, without the final 0;
                `num_inference_steps` is then ignored. A scheduler with a `shift` applies it to them.
            guidance_scale: Plain classifier-free guidance w: uncond + w * (cond - uncond), both in one forward.
                Values of at most 1 mean no guidance. If given, the pipeline's guider is not used in this call.
            num_images_per_prompt: Images for each label.
            generator: One generator, or one per image: then each image, routing included, depends only on its own
                generator and not on the rest of the batch.
            latents: [B, C, H, W] standard normal noise to start from; None draws it from `generator`.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent".
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each scheduler step; may
                return changed tensors, and set `pipe._guidance_scale` or `pipe.guider` for later steps (a scale of 0
                ends all guidance).
            callback_on_step_end_tensor_inputs: What the callback gets: "latents", "class_labels", or the labels as
                "prompt_embeds", whose changes are ignored.
            guidance_interval: Noise levels (low, high] at which guidance is on, by `guidance_scale` or by the guider;
                other steps make one dense prediction with the class. In the unit of `scheduler.sigmas`: EDM's
                sigma, flow matching's t in [0, 1], for DDPM sqrt((1 - abar) / abar). None for all. arXiv 2404.07724.
                An interval without any step is refused.
            guidance_rescale: Share, in [0, 1], of the rescaling of arXiv 2305.08891, section 3.4, with
                `guidance_scale`; a guider has its own.

        Returns:
            `images`: B images of the output type.

        Raises:
            ValueError: An argument is out of range, raised before any work; or samples are not finite, which an image
                would hide (not checked for output type "latent").
        """
        # Arguments.
        class_labels = self.get_label_ids(class_labels)
        image_size = self.transformer.config.sample_size * self.vae_scale_factor
        height = image_size if height is None else height
        width = image_size if width is None else width
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            class_labels,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guider=self.guider if guidance_scale is None else None,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # Labels, noise and timesteps.
        device = self._execution_device
        class_labels = torch.tensor(class_labels, device=device).repeat_interleave(num_images_per_prompt)  # B
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=np.array([float(sigma) for sigma in sigmas]), device=device)
        latents = self._prepare_latents(len(class_labels), height, width, generator, latents, device)  # B C H W
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        self._guided_steps = list(range(len(timesteps)))
        if guidance_interval is not None:
            self._guided_steps = steps_inside(self.scheduler, guidance_interval)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # saves a search, which would wait for the device

        # Sampling and decoding.
        try:
            callbacks = callback_on_step_end, callback_on_step_end_tensor_inputs
            latents = self._denoise(latents, timesteps, class_labels, generator, *callbacks, guidance_rescale)
            images = latents
            if output_type != "latent":
                images = self._decode(latents)
                check_finite_samples(latents, images, self.transformer.dtype)
        finally:
            self.maybe_free_model_hooks()  # also empties caches
        images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, class_labels: "int | str | Sequence[int | str] | torch.Tensor") -> list[int]:
        """Class ids from ids or names: single, in nested lists, or as tensors and arrays.

        Raises:
            ValueError: An unknown name, a name of several classes, or something that is not a label.
        """
        if hasattr(class_labels, "tolist"):  # a tensor or an array, of any shape
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (list, tuple, range)):
            return [label for entry in class_labels for label in self.get_label_ids(entry)]
        if isinstance(class_labels, str):
            return [self._label_id(class_labels)]
        if isinstance(class_labels, bool) or not hasattr(class_labels, "__index__"):
            raise ValueError(f"Expected class ids (int) or names (str), got {class_labels!r}.")
        return [class_labels.__index__()]

    def check_inputs(
        self,
        class_labels: list[int],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        sigmas: "Sequence[float] | np.ndarray | None",
        guidance_scale: float | None,
        guider: BaseGuidance | None,
        num_images_per_prompt: int,
        generator: "torch.Generator | list[torch.Generator] | None",
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
    ) -> None:
        """Raises ValueError for the first invalid argument of `__call__`."""
        # Components.
        config = self.transformer.config
        check_scheduler(self.scheduler, self.transformer)
        check_channels(self.transformer, self.vae)
        check_guidance_transformer(self.transformer, self.guidance_transformer)
        check_no_dropout(self.transformer)
        check_no_dropout(self.guidance_transformer)
        if hasattr(guider, "check_denoisers"):
            guider.check_denoisers(self.transformer, self.guidance_transformer)
        if sigmas is not None:
            check_sigmas(self.scheduler, sigmas)

        # Labels and sizes.
        batch_size = len(class_labels) * num_images_per_prompt
        stride = self.vae_scale_factor * config.get("patch_size", 1)
        if batch_size < 1:
            raise ValueError(
                f"Expected at least one label and one image per label, got {len(class_labels)} labels and "
                f"num_images_per_prompt={num_images_per_prompt}."
            )
        wrong = [label for label in class_labels if not 0 <= label <= config.num_classes]
        if wrong:
            raise ValueError(
                f"Expected class ids in [0, {config.num_classes}] (the last is the null class), got {wrong}."
            )
        if height < stride or width < stride or height % stride or width % stride:
            raise ValueError(f"Expected height and width divisible by {stride}, got {height}x{width}.")

        # Steps and guidance.
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"Expected an integer num_inference_steps >= 1, got {num_inference_steps!r}.")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"Expected a finite guidance_scale or None, got {guidance_scale!r}.")
        if guidance_interval is not None:
            check_interval(guidance_interval)
            if guider is None and guidance_scale is None:
                raise ValueError(
                    "Expected guidance_interval only with a guider or a guidance_scale, got neither. Leave it out."
                )
        if not 0.0 <= guidance_rescale <= 1.0 or (guidance_rescale and guidance_scale is None):
            raise ValueError(
                f"Expected guidance_rescale in [0, 1], above 0 only with a guidance_scale, got {guidance_rescale}. A "
                "guider has its own."
            )

        # Noise, output and callback.
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Expected one generator per image ({batch_size}), got {len(generator)}.")
        if not isinstance(generator, (torch.Generator, list, type(None))):
            raise ValueError(f"Expected a torch.Generator, a list of them or None, got {generator!r}.")
        shape = (batch_size, config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"Expected latents of shape {list(shape)}, got {list(latents.shape)}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"Expected output_type 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"Expected callback tensors among {self._callback_tensor_inputs}, got {sorted(unknown)}.")

    def _prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: "torch.Generator | list[torch.Generator] | None",
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Latents [B, C, H, W] float32 at the first noise level; the trajectory is fp32 whatever the model's dtype."""
        factor = self.vae_scale_factor
        shape = (batch_size, self.transformer.config.in_channels, height // factor, width // factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        generator: "torch.Generator | list[torch.Generator] | None",
        callback: Callable[["TREADPipeline", int, torch.Tensor, dict], dict | None] | None,
        callback_tensor_inputs: Sequence[str],
        guidance_rescale: float,
    ) -> torch.Tensor:
        """The latents [B, C, H, W] after all steps."""
        predict = GuidedPrediction(
            self.transformer,
            guidance_transformer=self.guidance_transformer,
            generator=generator,
            num_steps=self._num_timesteps,
        )
        step_generator = {"generator": generator} if _step_takes_generator(self.scheduler) else {}
        guided_steps = set(self._guided_steps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break

                # Prediction. Guider and scale are read at each step, because a callback may change them.
                scaled = self._scale(latents, timestep)
                guider, scale = (self.guider, None) if self._guidance_scale is None else (None, self._guidance_scale)
                guidance = {"guider": guider, "guidance_scale": scale, "guidance_rescale": guidance_rescale}
                guidance["is_guided"] = step in guided_steps
                prediction = predict(scaled, timestep, step, class_labels, **guidance)

                # Step.
                latents = self.scheduler.step(prediction, timestep, latents, **step_generator, return_dict=False)[0]

                # Callback.
                if callback is not None:
                    tensors = {"latents": latents, "class_labels": class_labels, "prompt_embeds": class_labels}
                    tensors = {name: tensors[name] for name in callback_tensor_inputs}
                    changed = callback(self, step, timestep, tensors) or {}
                    latents = changed.get("latents", latents)
                    class_labels = changed.get("class_labels", class_labels)
                progress_bar.update()
        return latents

    def _scale(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The latents, scaled by the scheduler for the model."""
        if hasattr(self.scheduler, "scale_model_input"):
            return self.scheduler.scale_model_input(latents, timestep)
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1]; for a model of pixels they are the same."""
        return latents if self.vae is None else decode_latents(self.vae, latents)

    def _label_id(self, name: str) -> int:
        id2label = self.config.id2label or {}
        ids = [
            int(index)
            for index, names in id2label.items()
            if name.strip() == names or name.strip() in [one.strip() for one in names.split(",")]
        ]
        if len(ids) == 1:
            return ids[0]
        if ids:
            raise ValueError(f"Expected a name of one class, got {name!r}, which names classes {ids}. Give the id.")
        known = list(id2label.values())
        hint = f"among {known[:10]}{' …' if len(known) > 10 else ''}" if known else "only with id2label; give ids"
        raise ValueError(f"Expected class names {hint}, got {name!r}.")


def _step_takes_generator(scheduler: SchedulerMixin) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
