# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The FLOPs of a denoiser with and without its routes, counted in a forward on the meta device, not derived.

A multiply-add counts as two FLOPs, as in torch's `FlopCounterMode`. The papers write "GFLOPs" for multiply-adds, half
of the numbers here. Norms, activations, softmax and residuals are not counted. This works for every denoiser of this
package, and for every diffusers model with `apply_token_routing` whose forward does not depend on tensor values.
"""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import BaseGuidance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .field_docs import with_field_docs
from .guiders import Branch, branches_of
from .routing import RoutedStack, RoutingCall, get_token_router


__all__ = [
    "Flops",
    "GuidanceFlops",
    "block_flops_saved",
    "flop_ceiling",
    "forward_flops",
    "guidance_flops",
    "training_flops",
]

# The products that attention decomposes into; all other counted operations are linear layers and convolutions.
_ATTENTION = ("aten.bmm", "aten.baddbmm")


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one sample."""

    linear: int
    """Linear layers and convolutions; half of this is the "GFLOPs" of the Sparse Guidance paper (see above)."""

    attention: int
    """The products query x key and weights x value, quadratic in the number of tokens."""

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(linear=self.linear + other.linear, attention=self.attention + other.attention)


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class GuidanceFlops:
    """FLOPs of guided sampling of one image, compared with classifier-free guidance (two dense forwards per step)."""

    steps: tuple[Flops, ...]
    """FLOPs of each step, all its forwards together."""

    dense: Flops
    """FLOPs of one dense forward of the main model."""

    @property
    def linear(self) -> int:
        """FLOPs of the linear layers, all steps together."""
        return sum(step.linear for step in self.steps)

    @property
    def total(self) -> int:
        """FLOPs of linear layers and attention, all steps together."""
        return sum(step.total for step in self.steps)

    @property
    def share_of_cfg(self) -> float:
        """`total` divided by the FLOPs of dense classifier-free guidance with as many steps."""
        return self.total / (len(self.steps) * 2 * self.dense.total)


def forward_flops(
    model: torch.nn.Module, inputs: Mapping[str, Any] | None = None, *, selection_ratio: float | None = None
) -> Flops:
    """FLOPs of one forward that takes the routes.

    Args:
        model: A denoiser of this package, on any device, or a diffusers model, with `apply_token_routing` unless it is
            dense. Not wrapped in DDP, and not modified. Adapters count; hooks of other libraries do not.
        inputs: The arguments of its forward for one sample; only the shapes are used. None: a latent of the training
            size and a class, for the denoisers of this package.
        selection_ratio: Share of tokens routed away, in [0, 1), on every route; 0.0 is dense. None: each route's own.

    Raises:
        ValueError: `selection_ratio` is out of range; the model needs `inputs`; or its forward depends on values.

    Example:
        >>> from diffusers_tread import TREADTransformer2DModel
        >>> from diffusers_tread.flops import forward_flops
        >>> model = TREADTransformer2DModel.from_preset("S/2", num_classes=10)
        >>> round(forward_flops(model, selection_ratio=0.0).total / forward_flops(model).total, 2)
        1.44
    """
    return _Counter(model, inputs).forward(selection_ratio)


def training_flops(
    model: torch.nn.Module, inputs: Mapping[str, Any] | None = None, *, selection_ratio: float | None = None
) -> int:
    """FLOPs of one forward and backward that take the routes, with decomposed attention.

    About three times the forward's, because each product needs two in the backward, one per factor. Not counted: the
    recomputation of gradient checkpointing or fused attention, the optimiser, weight averages, losses. Arguments and
    errors as `forward_flops`.
    """
    return _Counter(model, inputs).forward(selection_ratio, backward=True).total


def flop_ceiling(
    model: torch.nn.Module, inputs: Mapping[str, Any] | None = None, *, selection_ratio: float | None = None
) -> float:
    """Dense divided by routed FLOPs, with attention: the upper limit of a step's speed-up.

    With the default route and 256 tokens it is 1.44 for S/2, 1.43 for B/2, 1.67 for L/2 and 1.72 for XL/2 (1.95 with
    4,096 tokens). Arguments and errors as `forward_flops`.
    """
    counter = _Counter(model, inputs)
    return counter.forward(0.0).total / counter.forward(selection_ratio).total


def block_flops_saved(
    model: torch.nn.Module, inputs: Mapping[str, Any] | None = None, *, selection_ratio: float | None = None
) -> float:
    """The share of the blocks' FLOPs, with attention, that the routes save, in [0, 1).

    Arguments and errors as `forward_flops`.
    """
    counter = _Counter(model, inputs)
    dense, routed = (counter.blocks(ratio) for ratio in (0.0, selection_ratio))
    return 1.0 - routed / dense


def guidance_flops(
    model: torch.nn.Module,
    guider: BaseGuidance,
    *,
    num_steps: int = 40,
    guidance_model: torch.nn.Module | None = None,
    shared_prefix: bool = True,
    guided_steps: Collection[int] | None = None,
) -> GuidanceFlops:
    """FLOPs of sampling one image with a guider, schedules and intervals included.

    Args:
        model: The denoiser, one of this package.
        guider: The guider, such as `SparseGuidance`; not modified. The branches of diffusers' own guiders count as
            dense forwards of the model.
        num_steps: Guided predictions: the sampler's steps N, or 2N - 1 with Heun's method.
        guidance_model: Model that runs the branches of an earlier checkpoint; None for one of the same size.
        shared_prefix: Whether the blocks before the first route count only once for branches with the same inputs, as
            in `TREADPipeline`. False counts them for each branch, as the papers do and as in a loop of your own.
        guided_steps: The predictions, 0-based, that are guided, such as `TREADPipeline.guided_steps`; the others are
            one dense forward. None: the guider decides.

    Raises:
        ValueError: `num_steps` below 1, or as `forward_flops`.

    Example:
        >>> from diffusers_tread import SparseGuidance, TREADTransformer2DModel
        >>> from diffusers_tread.flops import guidance_flops
        >>> model = TREADTransformer2DModel.from_preset("S/2", num_classes=10)
        >>> round(guidance_flops(model, SparseGuidance(strong_ratio=0.2, weak_ratio=0.8)).share_of_cfg, 2)
        0.62
    """
    if num_steps < 1:
        raise ValueError(f"Expected num_steps >= 1, the guided predictions of one sampling, got {num_steps}.")
    counters = {"main": _Counter(model)}
    counters["guidance"] = counters["main"] if guidance_model is None else _Counter(guidance_model)
    counted: dict[Branch, Flops] = {}

    def branch_flops(branch: Branch) -> Flops:
        if branch not in counted:
            shares = shared_prefix and branch.shares_prefix and getattr(model, "_supports_prefix", False)
            counted[branch] = counters[branch.denoiser].forward(
                branch.selection_ratio, path_drop=branch.path_drop, with_prefix=shares
            )
        return counted[branch]

    # Each step's branches.
    guider, steps = copy.deepcopy(guider), []
    for step in range(num_steps):
        guider.set_state(step=step, num_inference_steps=num_steps, timestep=None)
        branches = branches_of(guider) if guided_steps is None or step in guided_steps else [Branch()]
        steps.append(sum((branch_flops(branch) for branch in branches), Flops(linear=0, attention=0)))
    return GuidanceFlops(steps=tuple(steps), dense=counters["main"].forward(0.0))


class _Counter:
    """Counts the FLOPs of forwards of a copy of a model on the meta device."""

    def __init__(self, model: torch.nn.Module, inputs: Mapping[str, Any] | None = None):
        model = getattr(model, "_orig_mod", model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, with its adapters
        self.model = _without_values(model)
        self.model.float()  # FLOPs do not depend on the dtype
        inputs = _example_inputs(model) if inputs is None else inputs
        self.inputs = {name: _to_meta(value) for name, value in inputs.items()}
        self.counter: FlopCounterMode | None = None
        self.known: dict[Any, tuple[torch.Tensor, dict[Any, int]]] = {}
        self.block_flops = 0
        for stack in _stacks(self.model):
            for block in stack:
                block.forward = _CountedBlock(block, self, is_ours=isinstance(stack, RoutedStack))

    def forward(
        self,
        selection_ratio: float | None,
        *,
        path_drop: bool = False,
        with_prefix: bool = False,
        backward: bool = False,
    ) -> Flops:
        """FLOPs of one forward, without the prefix's blocks if `with_prefix`, and of its backward if `backward`."""
        given = {"path_drop": True} if path_drop else {}
        if with_prefix:
            given["prefix"] = self._call(0.0, return_prefix=True).prefix.detach()
        counts = self._count(selection_ratio, backward=backward, **given)
        attention = sum(flops for operation, flops in counts.items() if str(operation).startswith(_ATTENTION))
        return Flops(linear=sum(counts.values()) - attention, attention=attention)

    def blocks(self, selection_ratio: float | None) -> int:
        """FLOPs of all blocks in the model's lists of blocks, in one forward."""
        self._count(selection_ratio)
        return self.block_flops

    def _count(self, selection_ratio: float | None, *, backward: bool = False, **given: Any) -> dict[Any, int]:
        self.block_flops = 0
        with FlopCounterMode(display=False) as self.counter, torch.set_grad_enabled(backward):
            output = self._call(selection_ratio, **given)
            if backward:
                prediction = output.sample if hasattr(output, "sample") else output[0]
                prediction.sum().backward()
        counts, self.counter = dict(self.counter.flop_counts["Global"]), None
        return counts

    def _call(self, selection_ratio: float | None, *, path_drop: bool = False, **given: Any) -> Any:
        if hasattr(self.model, "token_router") or selection_ratio or path_drop:
            get_token_router(self.model)
            given["routing"] = RoutingCall(enabled=True, selection_ratio=selection_ratio, path_drop=path_drop)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return self.model(**self.inputs, **given)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"Expected a model whose forward does not look at values, got {type(self.model).__name__} ({error}). "
                "Count a forward with data: torch.utils.flop_counter.FlopCounterMode."
            ) from error


class _CountedBlock:
    """Set as the `forward` of a block: adds up the FLOPs of blocks, and runs blocks of the same sizes only once.

    Blocks of other packages all run: what they do may depend on more than their arguments, such as routing.
    """

    def __init__(self, block: torch.nn.Module, counter: _Counter, *, is_ours: bool):
        self.block_forward, self.counter, self.is_ours = block.forward, counter, is_ours
        settings = [
            (name, value)
            for module in block.modules()
            for name, value in [("", type(module)), *vars(module).items()]
            if isinstance(value, (type, bool, int, float, str))
        ]
        self.kind = tuple(settings), tuple(parameter.shape for parameter in block.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.counter.counter is None:
            return self.block_forward(*args, **kwargs)

        # Reuse the result of an equal block, or run this one.
        totals, known = self.counter.counter.flop_counts["Global"], self.counter.known
        key = self.kind, str([getattr(argument, "shape", argument) for argument in args]) if self.is_ours else None
        may_reuse = self.is_ours and not torch.is_grad_enabled()
        if may_reuse and key in known:
            output, flops = known[key]
            for operation, count in flops.items():
                totals[operation] += count
        else:
            before = dict(totals)
            output = self.block_forward(*args, **kwargs)
            flops = {operation: count - before.get(operation, 0) for operation, count in totals.items()}
            if may_reuse:
                known[key] = output, flops
        self.counter.block_flops += sum(flops.values())
        return output


def _stacks(model: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    """The model's lists of blocks, also inside its `ModuleDict`s, and every `RoutedStack` wherever it is."""
    for module in model.children():
        if isinstance(module, torch.nn.ModuleList):
            yield module
        elif isinstance(module, torch.nn.ModuleDict):
            yield from _stacks(module)
        else:
            yield from (part for part in module.modules() if isinstance(part, RoutedStack))


def _without_values(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on the meta device, with adapters and routing, without hooks of other libraries."""
    # deepcopy does not copy what is in its memo.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")

    # Hooks (offloading, caches, a user's) may hold the model's weights, CUDA streams, or forwards of the model.
    keeps_forward = hasattr(model, "_token_routing")
    hooks = ("_diffusers_hook", "_hf_hook", *(() if keeps_forward else ("forward",)))
    for module in model.modules():
        memo |= {id(vars(module)[name]): None for name in hooks if name in vars(module)}
        memo |= {id(held): OrderedDict() for held in (module._forward_hooks, module._forward_pre_hooks)}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name in hooks:
            vars(module).pop(name, None)
    return copied


def _example_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Inputs of one sample for a denoiser of this package."""
    config: Any = model.config
    if "num_classes" not in config or "sample_size" not in config:
        raise ValueError(
            f"Expected `inputs`, the arguments of one forward of {type(model).__name__}, got none. Only the denoisers "
            "of this package do without."
        )
    return {
        "hidden_states": torch.empty(1, config["in_channels"], config["sample_size"], config["sample_size"]),
        "timestep": torch.empty(1),
        "class_labels": torch.empty(1, dtype=torch.int64),
    }


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta", torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(one) for one in value)
    return value
