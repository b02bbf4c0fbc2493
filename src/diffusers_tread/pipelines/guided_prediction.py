# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""One step's prediction by any guider, with as few and as large forwards as its branches allow.

Shapes: B images, C latent channels, H and W latent size.
"""

from typing import Any

import torch
from diffusers import BaseGuidance

from ..models import TREADTransformer2DModel
from ..routing import draw_routing_seed, get_token_router, token_routing


class GuidedPrediction:
    """Runs the denoisers of one sampling; called at each of its steps.

    Args:
        transformer: The denoiser, in evaluation mode.
        guidance_transformer: Runs the second branch of a guider with `weak_checkpoint`.
        guider: Any guider of diffusers; None for plain classifier-free guidance by `guidance_scale`.
        guidance_scale: w; None or at most 1 for the conditional prediction alone. Not looked at with a guider.
        generator: One generator, or one per image, from which the routes' subsets are drawn; None for torch's default.
        num_steps: Predictions of the whole sampling.
    """

    def __init__(
        self,
        transformer: TREADTransformer2DModel,
        *,
        guidance_transformer: TREADTransformer2DModel | None,
        guider: BaseGuidance | None,
        guidance_scale: float | None,
        generator: "torch.Generator | list[torch.Generator] | None",
        num_steps: int,
    ):
        self.transformer, self.guidance_transformer = transformer, guidance_transformer
        self.guider, self.guidance_scale = guider, guidance_scale
        self.generator, self.num_steps = generator, num_steps
        self.takes_prefix = _takes_prefix(transformer)

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, step: int, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """[B, C, H, W] float32, of latents as the scheduler scales them."""
        null_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
        if self.guider is not None:
            self.guider.set_state(step=step, num_inference_steps=self.num_steps, timestep=timestep)
            branches = self.guider.prepare_inputs({"class_labels": (class_labels, null_labels)})
            self._run_branches(branches, latents, timestep)
            return self.guider(branches)[0]

        # Plain classifier-free guidance.
        if self.guidance_scale is not None and self.guidance_scale > 1.0:
            conditional, unconditional = self._run_together([class_labels, null_labels], latents, timestep)
            return torch.lerp(unconditional, conditional, self.guidance_scale)
        return self._run(self.transformer, latents, timestep, class_labels)[0]

    def _run_branches(self, branches: list[Any], latents: torch.Tensor, timestep: torch.Tensor) -> None:
        """Sets `noise_pred` of each branch of a step."""
        # Dense branches that differ in the condition alone are one forward.
        guider = self.guider
        changes_model = type(guider).prepare_models is not BaseGuidance.prepare_models
        if not changes_model and not get_token_router(self.transformer).is_routing(training=False):
            predictions = self._run_together([branch.class_labels for branch in branches], latents, timestep)
            for branch, prediction in zip(branches, predictions, strict=True):
                branch.noise_pred = prediction
            return

        # The others run one by one; with the same inputs, the second goes on where the first met its first route.
        shares = self.takes_prefix and len(branches) == 2 and getattr(guider, "shares_inputs", False)
        prefix = {"return_prefix": True} if shares else {}
        for index, branch in enumerate(branches):
            is_checkpoint = index == 1 and getattr(guider, "weak_checkpoint", False)
            transformer = self.guidance_transformer if is_checkpoint else self.transformer
            guider.prepare_models(transformer)
            try:
                output = self._run(transformer, latents, timestep, branch.class_labels, **prefix)
            finally:
                guider.cleanup_models(transformer)
            branch.noise_pred = output[0]
            if shares and index == 0:
                prefix = {"prefix": output[-1].clone()}

    def _run_together(
        self, class_labels: list[torch.Tensor], latents: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """One forward for the same latents with several labels each; a prediction [B, C, H, W] for each of them."""
        many = torch.cat([latents] * len(class_labels))
        predictions = self._run(self.transformer, many, timestep, torch.cat(class_labels))[0]
        return predictions.chunk(len(class_labels))

    def _run(
        self,
        transformer: TREADTransformer2DModel,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        **prefix: Any,
    ) -> tuple[torch.Tensor, ...]:
        """One forward in the model's dtype: the prediction in float32, and the prefix last where that is asked for.

        Where it routes, its subset is drawn from the caller's generators.
        """
        router, generator = get_token_router(transformer), self.generator
        seed = router.seed
        if seed is None and generator is not None and router.is_routing(training=False):
            if isinstance(generator, list):
                generator = generator * (len(latents) // len(generator))  # for each half of classifier-free guidance
            seed = draw_routing_seed(generator, device=latents.device)
        # Not `transformer.dtype`, which looks at every module.
        latents = latents.to(transformer.patch_embedding.weight.dtype)
        with token_routing(transformer, seed=seed):
            prediction, *others = transformer(
                latents, timestep, class_labels=class_labels, return_dict=False, **prefix
            )
        # Copied, also above: a CUDA graph of torch.compile writes its next outputs over these. Not tried here.
        return prediction.to(torch.float32, copy=True), *others


def _takes_prefix(transformer: TREADTransformer2DModel) -> bool:
    """Whether two forwards of `transformer` can share the blocks in front of its first route."""
    # Group offloading fetches the blocks in the order of the first forward: older diffusers (seen in 0.36) fails where
    # the first ones are left out.
    hooks = [module._diffusers_hook for module in transformer.modules() if hasattr(module, "_diffusers_hook")]
    is_offloaded = any(hook.get_hook("group_offloading") is not None for hook in hooks)
    return getattr(transformer, "_supports_prefix", False) and not is_offloaded  # older code from the Hub has none
