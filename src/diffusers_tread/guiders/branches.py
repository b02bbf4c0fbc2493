# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a guider combines in a step: predictions that differ in condition, routing or denoiser."""

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
    """What the denoiser is conditioned on: what the user gave, or the null condition."""

    selection_ratio: float = 0.0
    """Share of tokens routed away, in [0, 1); 0.0 is dense."""

    denoiser: Literal["main", "guidance"] = "main"
    """Who runs it: the denoiser that is sampled from, or the one that guides it, such as an earlier checkpoint."""

    path_drop: bool = False
    """Whether the blocks of routes with rejoin "fuse" are left out, see `RoutingCall.path_drop`."""

    shares_prefix: bool = False
    """Whether it has the denoiser, condition and inputs of the first branch, so that all blocks in front of the first
    route compute the same."""


class _Prepared(threading.local):
    """What `prepare_models` has done in this thread."""

    def __init__(self):
        self.count = 0
        self.first_router: TokenRouter | None = None
        self.routing = ExitStack()


class BranchGuidance(BaseGuidance):
    """A guider of diffusers that says what it runs by `branches`, and combines by `forward`.

    `TREADPipeline` and `guidance_flops` read the branches. Other loops, diffusers' modular pipelines among them, use
    it as any guider: `prepare_models` sets the routing of a branch for the thread, and `cleanup_models` takes it back.
    The step that `set_state` told belongs to the guider: loops that run side by side each take a `copy.copy` of it, as
    `TREADPipeline` does.

    A guider of your own is a subclass in one file with a constructor under `register_to_config`, `branches` and
    `forward`, and one line `register_guider(MyGuider)`.
    """

    # The names that diffusers' modular loops know, one for each branch; "uncond" is the second one, whatever it is.
    _input_predictions = ["pred_cond", "pred_uncond"]

    def __init__(self, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        self._prepared = _Prepared()
        super().__init__(start, stop, enabled)

    if TYPE_CHECKING:  # diffusers wants a LongTensor, which no scheduler of EDM or flow matching has

        def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor | None) -> None: ...

    @abstractmethod
    def branches(self) -> list[Branch]:
        """The branches of the current step, which `set_state` told.

        Returns:
            At least one; as many as `forward` takes predictions.

        Raises:
            ValueError: They depend on the step, and `set_state` was not called.
        """

    @abstractmethod
    def forward(self, *predictions: torch.Tensor) -> GuiderOutput:
        """Combines the predictions of the branches, each of the same shape."""

    def check_denoisers(self, denoiser: torch.nn.Module, guidance_denoiser: torch.nn.Module | None = None) -> None:
        """Raises ValueError if these denoisers cannot run the branches; to be called before sampling.

        Args:
            denoiser: The main one.
            guidance_denoiser: The one of branches with `denoiser="guidance"`; not looked at otherwise.
        """

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Sets the branch's routing in this thread; call `cleanup_models` after the forward, also on error.

        Raises:
            ValueError: The denoiser has no routes and the branch a ratio, or none whose path the branch could drop,
                or the branch wants another denoiser than the first one.
        """
        self.cleanup_models(denoiser)  # what a caller left behind that failed in between
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
        self._count_prepared += 1
        self._prepared.routing.enter_context(
            token_routing(denoiser, enabled=True, selection_ratio=branch.selection_ratio, path_drop=branch.path_drop)
        )

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Takes the branch's routing back."""
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
    def _count_prepared(self) -> int:  # diffusers' name for it, set by its constructor and `set_state`
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
        """Branches, and so model calls, of the current step."""
        return len(self.branches())

    def _inputs(self) -> list[tuple[int, str]]:
        """Per branch the index into (conditional, unconditional) inputs and the prediction's name."""
        self._count_prepared = 0  # the first branch comes first, also in a loop that does not call `set_state`
        indices = [0 if branch.condition == "given" else 1 for branch in self.branches()]
        return list(zip(indices, self._input_predictions, strict=False))

    def _is_within_range(self) -> bool:
        """Whether the current step is one of those that are guided."""
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first = int(self._start * self._num_inference_steps)
        last = int(self._stop * self._num_inference_steps)
        return first <= self._step < last


def branches_of(guider: BaseGuidance) -> list[Branch]:
    """The branches of the current step of any guider; those of diffusers' own are dense and of the main denoiser."""
    # Not by its class: a guider from the Hub brings code of its own.
    return guider.branches() if hasattr(guider, "branches") else [Branch()] * guider.num_conditions


def check_routes(denoiser: torch.nn.Module, selection_ratio: float) -> None:
    """Raises ValueError if the ratio is above 0 and the denoiser has no routes, or cannot take them as it is set
    up."""
    if selection_ratio == 0.0:
        return
    if not get_token_router(denoiser).routes:
        raise ValueError(
            f"Expected a denoiser with token routes, got {type(denoiser).__name__} with routes=None. Use a model "
            "trained with routes, or another guider."
        )
    check_can_route(denoiser)
