# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The prediction of one step with any guider, in as few and as large forwards as its branches allow.

Shapes: B images, C latent channels, H and W latent size.
"""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import BaseGuidance, ModelMixin
from diffusers.guiders.guider_utils import rescale_noise_cfg

from ..guiders import Branch
from ..guiders.branches import check_routes
from ..objectives import find_objective
from ..routing import RoutingCall, TokenRouter, draw_routing_seed, get_token_router, has_cache, hook_names


class GuidedPrediction:
    """Runs the denoisers of one sampling; called at each of its steps.

    Denoisers and guider stay unchanged, except for what diffusers keeps in the model: a cache and, during a forward,
    the hooks of `SkipLayerGuidance`, `PerturbedAttentionGuidance` and other guiders with `prepare_models`.

    Args:
        transformer: The denoiser.
        guidance_transformer: Runs the branches with `denoiser="guidance"`.
        generator: One generator, or one per image, for the routes' subsets; None for torch's default.
        num_steps: Number of predictions in the whole sampling.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        *,
        guidance_transformer: ModelMixin | None,
        generator: "torch.Generator | list[torch.Generator] | None",
        num_steps: int,
    ):
        self.denoisers = {"main": transformer, "guidance": guidance_transformer}
        self.generator, self.num_steps = generator, num_steps
        self.objective = find_objective(transformer.config.objective)
        self.takes_prefix = _takes_prefix(transformer)
        self.batch_size: int | None = None
        self.given: tuple[BaseGuidance | None, dict[str, Any]] = None, {}

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        class_labels: torch.Tensor,
        *,
        guider: BaseGuidance | None,
        guidance_scale: float | None,
        guidance_rescale: float = 0.0,
        is_guided: bool = True,
    ) -> torch.Tensor:
        """The prediction of one step.

        Args:
            latents: [B, C, H, W] float32, as the scheduler scales them.
            timestep: The scheduler's timestep.
            step: Index of the prediction, 0-based.
            class_labels: [B] int64.
            guider: Any diffusers guider; None for plain classifier-free guidance by `guidance_scale`.
            guidance_scale: w; None or at most 1 for the conditional prediction alone. Ignored with a guider.
            guidance_rescale: Share, in [0, 1], of the rescaling of arXiv 2305.08891, section 3.4. Ignored with a
                guider.
            is_guided: False for the conditional prediction alone; it is dense if the guider routes.

        Returns:
            [B, C, H, W] float32.
        """
        # No guidance.
        labels = {"given": class_labels}
        labels["null"] = torch.full_like(class_labels, self.denoisers["main"].config.num_classes)
        if not is_guided:
            routing = RoutingCall(enabled=False) if hasattr(guider, "branches") else None
            return self._run(self.denoisers["main"], latents, timestep, class_labels, routing)[0]

        # A guider.
        if guider is not None:
            guider = self._own(guider)
            guider.set_state(step=step, num_inference_steps=self.num_steps, timestep=timestep)
            if hasattr(guider, "branches"):  # not isinstance: one from the Hub brings its own class
                predictions = self._run_branches(guider.branches(), latents, timestep, labels)
                return guider.forward(*predictions)[0]
            return self._run_guider(guider, latents, timestep, labels)

        # Plain classifier-free guidance.
        if guidance_scale is not None and guidance_scale > 1.0:
            conditional, unconditional = self._run_together([labels["given"], labels["null"]], latents, timestep)
            guided = torch.lerp(unconditional, conditional, guidance_scale)
            return rescale_noise_cfg(guided, conditional, guidance_rescale) if guidance_rescale > 0.0 else guided
        return self._run(self.denoisers["main"], latents, timestep, class_labels)[0]

    def _own(self, guider: BaseGuidance) -> BaseGuidance:
        """This sampling's own copy of the guider, which holds the step; copied anew if the guider has changed."""
        if self.given[0] is not guider or self.given[1] != vars(guider):
            if hasattr(guider, "check_denoisers"):
                guider.check_denoisers(self.denoisers["main"], self.denoisers["guidance"])
            self.given, self.own_guider = (guider, dict(vars(guider))), copy.copy(guider)
        return self.own_guider

    def _run_branches(
        self, branches: list[Branch], latents: torch.Tensor, timestep: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> "list[torch.Tensor] | tuple[torch.Tensor, ...]":
        """The prediction of each branch."""
        # Dense branches that differ only in the condition run in one forward.
        if all(branch == Branch(condition=branch.condition) for branch in branches):
            dense = RoutingCall(enabled=False)
            return self._run_together([labels[branch.condition] for branch in branches], latents, timestep, dense)

        # Other branches run one by one; those with the first branch's inputs reuse its tokens before the first route.
        shares = self.takes_prefix and any(branch.shares_prefix for branch in branches[1:])
        predictions, prefix = [], None
        for index, branch in enumerate(branches):
            if self.denoisers[branch.denoiser] is None:
                raise ValueError("Expected a guidance_transformer, which a branch of the guider runs, got None.")
            asked = {"return_prefix": True} if shares and index == 0 else {}
            asked |= {"prefix": prefix} if shares and branch.shares_prefix else {}
            routing = RoutingCall(enabled=True, selection_ratio=branch.selection_ratio, path_drop=branch.path_drop)
            output = self._run(
                self.denoisers[branch.denoiser],
                latents,
                timestep,
                labels[branch.condition],
                routing,
                context=f"branch {index}",
                **asked,
            )
            predictions.append(output[0])
            if "return_prefix" in asked:
                prefix = output[-1].clone()
        return predictions

    def _run_guider(
        self, guider: BaseGuidance, latents: torch.Tensor, timestep: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The guided prediction of a diffusers guider, which may change the model for each of its batches."""
        # In one forward if nothing differs between the batches, else one by one.
        transformer = self.denoisers["main"]
        batches = guider.prepare_inputs({"class_labels": (labels["given"], labels["null"])})
        changes_model = type(guider).prepare_models is not BaseGuidance.prepare_models
        if not changes_model and not get_token_router(transformer).is_routing(training=False):
            predictions = self._run_together([batch.class_labels for batch in batches], latents, timestep)
        else:
            predictions = []
            for batch in batches:
                guider.prepare_models(transformer)
                # The cache context is the batch's name: with some guiders the second batch is not always the same one.
                name = getattr(batch, guider._identifier_key)
                try:
                    output = self._run(transformer, latents, timestep, batch.class_labels, context=name)
                finally:
                    guider.cleanup_models(transformer)
                predictions.append(output[0])

        # The guider combines them.
        for batch, prediction in zip(batches, predictions, strict=True):
            batch.noise_pred = prediction
        return guider(batches)[0]

    def _run_together(
        self,
        class_labels: list[torch.Tensor],
        latents: torch.Tensor,
        timestep: torch.Tensor,
        routing: RoutingCall | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """A prediction [B, C, H, W] per tensor of labels, in one forward unless routing has per-sample settings."""
        transformer = self.denoisers["main"]
        if _routes_per_sample(get_token_router(transformer), routing):
            return tuple(self._run(transformer, latents, timestep, labels, routing)[0] for labels in class_labels)
        many = torch.cat([latents] * len(class_labels))
        predictions = self._run(transformer, many, timestep, torch.cat(class_labels), routing)[0]
        return predictions.chunk(len(class_labels))

    def _run(
        self,
        transformer: ModelMixin,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        routing: RoutingCall | None = None,
        context: str = "all",
        **prefix: Any,
    ) -> tuple[torch.Tensor, ...]:
        """One forward in the model's dtype; returns the scheduler's prediction in float32, and last the prefix if
        requested.

        It routes as in evaluation mode, whatever mode the model is in. Its subset is drawn from the caller's
        generators, and a diffusers cache keeps separate states for each `context`.
        """
        # How it routes.
        router, generator, seed = get_token_router(transformer), self.generator, None
        is_routing = router.is_routing(training=False, call=routing)
        if not is_routing and routing is not None and routing.selection_ratio:
            check_routes(transformer, routing.selection_ratio)  # raises: there are none
        if is_routing and generator is not None and router.resolve().seed is None:
            if isinstance(generator, list):
                generator = generator * (len(latents) // len(generator))  # for each half of classifier-free guidance
            seed = draw_routing_seed(generator, device=latents.device)
        ratio = None if routing is None else routing.selection_ratio
        # Never None: then a model in training mode would drop random samples. Code from the Hub may lack the field.
        path_drop = bool(getattr(router.resolve(routing), "path_drop", False))
        call = RoutingCall(enabled=is_routing, selection_ratio=ratio, seed=seed, path_drop=path_drop)

        # The forward.
        is_caching = getattr(transformer, "is_cache_enabled", False)
        if is_caching and self.batch_size not in (None, len(latents)):
            transformer._reset_stateful_cache()  # guidance began or ended: the cached states are of another batch
        self.batch_size = len(latents)
        with transformer.cache_context(context) if is_caching else nullcontext():
            prediction, *others = transformer(
                latents.to(_input_dtype(transformer)),
                timestep,
                class_labels=class_labels,
                return_dict=False,
                routing=call,
                **prefix,
            )

        # Copied (as is the prefix): a CUDA graph of torch.compile overwrites its outputs in the next call.
        prediction = self.objective.for_scheduler(prediction.to(torch.float32, copy=True), latents, timestep)
        return prediction, *others


def _input_dtype(transformer: ModelMixin) -> torch.dtype:
    """The dtype of the first parameter. Not `transformer.dtype`, which looks at every module."""
    return next(transformer.parameters()).dtype


def _routes_per_sample(router: TokenRouter, routing: RoutingCall | None) -> bool:
    """Whether a forward routes by a seed or a `force_keep` with one entry for each sample."""
    said = router.resolve(routing)
    has_seeds = said.seed is not None and said.seed.dim() == 1
    has_masks = said.force_keep is not None and said.force_keep.dim() == 2
    return (has_seeds or has_masks) and router.is_routing(training=False, call=routing)


def _takes_prefix(transformer: ModelMixin) -> bool:
    """Whether two forwards of `transformer` can share the blocks before its first route."""
    # A diffusers cache compares the first block's output in each forward.
    if not getattr(transformer, "_supports_prefix", False) or has_cache(transformer):
        return False
    # Group offloading fetches the blocks in the order of the first forward, and diffusers 0.36 fails if the first ones
    # are skipped (`LazyPrefetchGroupOffloadingHook`):
    # https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/hooks/group_offloading.py
    return "group_offloading" not in hook_names(transformer)
