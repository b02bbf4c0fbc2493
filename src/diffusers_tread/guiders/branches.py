# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The branches of a guider: the predictions it combines in a step, which differ in condition, routing or denoiser."""

import threading
from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput

from ..field_docs import with_field_docs
from ..routing import TokenRouter, check_can_route, get_token_router, token_routing


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Branch:
    """One of the predictions that a guider combines in a step."""

    condition: Literal["given", "null"] = "given"
    """The condition: the user's, or the null condition."""

    selection_ratio: float = 0.0
    """Share of tokens routed away, in [0, 1); 0.0 is dense."""

    denoiser: Literal["main", "guidance"] = "main"
    """The denoiser that runs it: the one that is sampled, or one that guides it, such as an earlier checkpoint."""

    path_drop: bool = False
    """Whether the blocks of routes with rejoin "fuse" are skipped, see `RoutingCall.path_drop`."""

    shares_prefix: bool = False
    """Whether it has the denoiser, condition and inputs of the first branch, so that the blocks before the first route
    compute the same in both."""


class _Prepared(threading.local):
    """State of `prepare_models` in this thread."""

    def __init__(self):
        self.count = 0
        self.first_router: TokenRouter | None = None
        self.routing = ExitStack()


class BranchGuidance(BaseGuidance):
    """A diffusers guider whose predictions are listed by `branches` and combined by `forward`.

    `TREADPipeline` and `guidance_flops` read the branches. Other loops, such as diffusers' modular pipelines, use it
    like any guider: `prepare_models` sets the routing of a branch for the thread, and `cleanup_models` removes it.
    The guider keeps the step from `set_state`, so loops that run in parallel must each take a `copy.copy` of it, as
    `TREADPipeline` does.

    A guider of your own is a subclass in one file with a constructor under `register_to_config`, `branches` and
    `forward`, and one line `register_guider(MyGuider)`.
    """

    # The names that diffusers' modular loops expect, one per branch; "uncond" is the second branch, whatever it is.
    _input_predictions = ["pred_cond", "pred_uncond"]

    def __init__(self, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        self._prepared = _Prepared()
        super().__init__(start, stop, enabled)

    if TYPE_CHECKING:  # diffusers wants a LongTensor, which no scheduler of EDM or flow matching has

        def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor | None) -> None: ...

    @abstractmethod
    def branches(self) -> list[Branch]:
        """The branches of the current step, as set by `set_state`.

        Returns:
            At least one; as many as `forward` takes predictions.

        Raises:
            ValueError: They depend on the step, and `set_state` was not called.
        """

    @abstractmethod
    def forward(self, *predictions: torch.Tensor) -> GuiderOutput:
        """Combines the predictions of the branches, each of the same shape."""

    def check_denoisers(self, denoiser: torch.nn.Module, guidance_denoiser: torch.nn.Module | None = None) -> None:
        """Raises ValueError if these denoisers cannot run the branches; call it before sampling.

        Args:
            denoiser: The main denoiser.
            guidance_denoiser: The denoiser of branches with `denoiser="guidance"`; ignored without such branches.
        """

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Sets the branch's routing in this thread; call `cleanup_models` after the forward, also on error.

        Raises:
            ValueError: The branch has a ratio and the denoiser no routes; the branch drops the path and no route
                allows it; or the branch needs another denoiser than the first branch.
        """
        self.cleanup_models(denoiser)  # left behind by a caller that failed in between

        # Checks.
        index = self._count_prepared
        branch, router = self.branches()[index], get_token_router(denoiser)
        check_routes(denoiser, branch.selection_ratio)
        if branch.path_drop:
            router.check_path_drop()
        if index == 0:
            self._prepared.first_router = router
        elif branch.denoiser == "guidance" and router is self._prepared.first_router:
            raise ValueError(
                "Expected another denoiser for the weak branch (weak_checkpoint=True), got the strong branch's. "
                "Use TREADPipeline with a guidance_transformer, or weak_checkpoint=False."
            )

        # The routing.
        self._count_prepared += 1
        self._prepared.routing.enter_context(
            token_routing(denoiser, enabled=True, selection_ratio=branch.selection_ratio, path_drop=branch.path_drop)
        )

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Removes the branch's routing."""
        self._prepared.routing.close()

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch per branch from `{name: (conditional, unconditional)}` or `{name: tensor}`."""
        return [self._prepare_batch(data, index, prediction) for index, prediction in self._inputs()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, from the block state of a modular pipeline."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, prediction)
            for index, prediction in self._inputs()
        ]

    @property
    def _count_prepared(self) -> int:  # diffusers' name; its constructor and `set_state` assign to it
        return self._prepared.count

    @_count_prepared.setter
    def _count_prepared(self, count: int) -> None:
        self._prepared.count = count

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_prepared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _prepared=_Prepared())

    @property
    def is_conditional(self) -> bool:
        """Whether the branch being run is the first one."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Number of branches, and so of model calls, in the current step."""
        return len(self.branches())

    def _inputs(self) -> list[tuple[int, str]]:
        """Per branch the index into (conditional, unconditional) inputs, and the prediction's name."""
        self._count_prepared = 0  # start with the first branch, also in a loop that does not call `set_state`
        indices = [0 if branch.condition == "given" else 1 for branch in self.branches()]
        return list(zip(indices, self._input_predictions, strict=False))

    def _is_within_range(self) -> bool:
        """Whether the current step is guided."""
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first = int(self._start * self._num_inference_steps)
        last = int(self._stop * self._num_inference_steps)
        return first <= self._step < last


def branches_of(guider: BaseGuidance) -> list[Branch]:
    """The current step's branches of any guider; diffusers' own guiders have dense ones of the main denoiser."""
    # Not isinstance: a guider from the Hub brings its own copy of the class.
    return guider.branches() if hasattr(guider, "branches") else [Branch()] * guider.num_conditions


def check_routes(denoiser: torch.nn.Module, selection_ratio: float) -> None:
    """Raises ValueError if the ratio is above 0 and the denoiser has no routes, or its setup does not allow them."""
    if selection_ratio == 0.0:
        return
    if not get_token_router(denoiser).routes:
        raise ValueError(
            f"Expected a denoiser with token routes, got {type(denoiser).__name__} with routes=None. Use a model "
            "trained with routes, or another guider."
        )
    check_can_route(denoiser)
