# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""One step's prediction by any guider, with as few and as large forwards as its branches allow.

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

    Changes nothing about them, nor about the guider, but what diffusers keeps in the model: a cache, and while their
    forward runs the hooks of `SkipLayerGuidance`, `PerturbedAttentionGuidance` and others that have `prepare_models`.

    Args:
        transformer: The denoiser.
        guidance_transformer: Runs the branches with `denoiser="guidance"`.
        generator: One generator, or one per image, from which the routes' subsets are drawn; None for torch's default.
        num_steps: Predictions of the whole sampling.
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
            timestep: Of the scheduler.
            step: Which of the predictions, 0-based.
            class_labels: [B] int64.
            guider: Any guider of diffusers; None for plain classifier-free guidance by `guidance_scale`.
            guidance_scale: w; None or at most 1 for the conditional prediction alone. Not looked at with a guider.
            guidance_rescale: Share, in [0, 1], of the rescaling of arXiv 2305.08891, section 3.4; likewise.
            is_guided: False for the conditional prediction alone, dense under a guider that routes.

        Returns:
            [B, C, H, W] float32.
        """
        labels = {"given": class_labels}
        labels["null"] = torch.full_like(class_labels, self.denoisers["main"].config.num_classes)
        if not is_guided:
            routing = RoutingCall(enabled=False) if hasattr(guider, "branches") else None
            return self._run(self.denoisers["main"], latents, timestep, class_labels, routing)[0]
        if guider is not None:
            guider = self._own(guider)
            guider.set_state(step=step, num_inference_steps=self.num_steps, timestep=timestep)
            if hasattr(guider, "branches"):  # not by its class: a guider from the Hub brings code of its own
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
        """A copy that this sampling alone tells its steps; a new one where the guider was replaced or changed."""
        if self.given[0] is not guider or self.given[1] != vars(guider):
            if hasattr(guider, "check_denoisers"):
                guider.check_denoisers(self.denoisers["main"], self.denoisers["guidance"])
            self.given, self.own_guider = (guider, dict(vars(guider))), copy.copy(guider)
        return self.own_guider

    def _run_branches(
        self, branches: list[Branch], latents: torch.Tensor, timestep: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> "list[torch.Tensor] | tuple[torch.Tensor, ...]":
        """The prediction of each branch."""
        # Dense branches that differ in the condition alone are one forward.
        if all(branch == Branch(condition=branch.condition) for branch in branches):
            dense = RoutingCall(enabled=False)
            return self._run_together([labels[branch.condition] for branch in branches], latents, timestep, dense)

        # The others run one by one; with the same inputs, they go on where the first met its first route.
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
        """The guided prediction of a guider of diffusers, which may change the model for a batch of its own."""
        transformer = self.denoisers["main"]
        batches = guider.prepare_inputs({"class_labels": (labels["given"], labels["null"])})
        changes_model = type(guider).prepare_models is not BaseGuidance.prepare_models
        if not changes_model and not get_token_router(transformer).is_routing(training=False):
            predictions = self._run_together([batch.class_labels for batch in batches], latents, timestep)
        else:
            predictions = []
            for batch in batches:
                guider.prepare_models(transformer)
                # By its name: with some guiders a step's second batch is not always the same prediction.
                name = getattr(batch, guider._identifier_key)
                try:
                    output = self._run(transformer, latents, timestep, batch.class_labels, context=name)
                finally:
                    guider.cleanup_models(transformer)
                predictions.append(output[0])
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
        """A prediction [B, C, H, W] for each of several labels, in one forward unless routing has settings per
        sample."""
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
        """One forward in the model's dtype: what the scheduler takes of it in float32, and the prefix last where that
        is asked for.

        It routes as in evaluation mode, whatever mode the model is in. Its subset is drawn from the caller's
        generators, and a cache of diffusers keeps what belongs to `context` apart.
        """
        router, generator, seed = get_token_router(transformer), self.generator, None
        is_routing = router.is_routing(training=False, call=routing)
        if not is_routing and routing is not None and routing.selection_ratio:
            check_routes(transformer, routing.selection_ratio)  # it has none
        if is_routing and generator is not None and router.resolve().seed is None:
            if isinstance(generator, list):
                generator = generator * (len(latents) // len(generator))  # for each half of classifier-free guidance
            seed = draw_routing_seed(generator, device=latents.device)
        ratio = None if routing is None else routing.selection_ratio
        # Never None, with which a model in training mode draws samples. Not all code from the Hub knows it.
        path_drop = bool(getattr(router.resolve(routing), "path_drop", False))
        call = RoutingCall(enabled=is_routing, selection_ratio=ratio, seed=seed, path_drop=path_drop)
        is_caching = getattr(transformer, "is_cache_enabled", False)
        if is_caching and self.batch_size not in (None, len(latents)):
            transformer._reset_stateful_cache()  # guidance began or ended: what it keeps is of another batch
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
        # Copied, also above: a CUDA graph of torch.compile writes its next outputs over these.
        prediction = self.objective.for_scheduler(prediction.to(torch.float32, copy=True), latents, timestep)
        return prediction, *others


def _input_dtype(transformer: ModelMixin) -> torch.dtype:
    """What the first layer computes in. Not `transformer.dtype`, which looks at every module."""
    return next(transformer.parameters()).dtype


def _routes_per_sample(router: TokenRouter, routing: RoutingCall | None) -> bool:
    """Whether a forward routes by a seed or a `force_keep` with one entry for each sample."""
    said = router.resolve(routing)
    has_seeds = said.seed is not None and said.seed.dim() == 1
    has_masks = said.force_keep is not None and said.force_keep.dim() == 2
    return (has_seeds or has_masks) and router.is_routing(training=False, call=routing)


def _takes_prefix(transformer: ModelMixin) -> bool:
    """Whether two forwards of `transformer` can share the blocks in front of its first route."""
    # A cache of diffusers compares what its first block gives in each forward.
    if not getattr(transformer, "_supports_prefix", False) or has_cache(transformer):
        return False
    # Group offloading fetches the blocks in the order of the first forward, and diffusers 0.36 fails where the first
    # ones are left out (`LazyPrefetchGroupOffloadingHook`):
    # https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/hooks/group_offloading.py
    return "group_offloading" not in hook_names(transformer)
