# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Sparse Guidance for diffusers pipelines that take no guider, by answering the calls of their transformer."""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..guiders import Branch, SparseGuidance
from ..routing import draw_routing_seed, get_token_router, token_routing
from .cfg_layouts import find_layout
from .noise_levels import check_interval, steps_inside


class GuidedPipeline:
    """Samples with `SparseGuidance` from a text-to-image pipeline that takes no guider.

    Called like the pipeline. During a call, each call of the transformer returns a guided prediction, while the
    pipeline's own loop runs unchanged. Outside of a call nothing about the pipeline is changed.

    With `null_weak_branch` (CFG + SG) the pipeline runs its own classifier-free guidance, including renormalisation;
    its conditional prediction is the strong branch and its unconditional one the weak branch. Otherwise both branches
    have the prompt, and the pipeline's own guidance is off. Its argument for the scale is set in either case. The
    subsets of tokens are drawn from the `generator` of the call.

    Other threads that use the transformer at the same time are not guided.

    Args:
        pipeline: One of `PIPELINE_LAYOUTS`, its transformer prepared by `apply_token_routing`.
        guider: A `SparseGuidance`.
        guidance_transformer: An earlier checkpoint, for `weak_checkpoint=True`.
        guidance_interval: Noise levels (low, high] at which guidance is on, in the unit of `scheduler.sigmas` (flow
            matching's t in [0, 1]); other steps make one dense prediction. None for all. arXiv 2404.07724.

    Raises:
        ValueError: The pipeline or the guider cannot be used, or not together; the message gives the reason.

    Example:
        >>> from diffusers_tread import GuidedPipeline, SparseGuidance, TokenRoute, apply_token_routing
        >>> def sample(pipeline, prompt):
        ...     apply_token_routing(pipeline.transformer, TokenRoute(start=2, end=-4))
        ...     guider = SparseGuidance(guidance_scale=1.8, strong_ratio=0.1, weak_ratio=0.8)
        ...     return GuidedPipeline(pipeline, guider)(prompt, num_inference_steps=40).images
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        guider: SparseGuidance,
        *,
        guidance_transformer: torch.nn.Module | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ):
        if guidance_interval is not None:
            check_interval(guidance_interval)
        self.guidance_interval = guidance_interval
        self.pipeline, self.guider, self.guidance_transformer = pipeline, guider, guidance_transformer
        self.layout = find_layout(pipeline)
        self._check()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the pipeline with these arguments, which must not include its scale of classifier-free guidance.

        Raises:
            ValueError: The scale is given, or the pipeline does not call its transformer as its layout says.
        """
        # The pipeline's own scale.
        self._check()
        pipeline, guider, scale = self.pipeline, self.guider, self.layout.scale
        given = inspect.signature(type(pipeline).__call__).bind_partial(pipeline, *args, **kwargs).arguments
        if scale is not None:
            if scale in given:
                raise ValueError(
                    f"Expected no {scale} in the call, got {given[scale]!r}. The guider has it: "
                    "SparseGuidance(guidance_scale=...)."
                )
            kwargs[scale] = (guider.guidance_scale if self._uses_cfg else 1.0) - self.layout.offset

        # Its loop.
        steps = _GuidedSteps(self, uses_cfg=self._uses_cfg, generator=given.get("generator"))
        with _forwards_answered(pipeline.transformer, steps), _steps_counted(pipeline.scheduler, steps):
            return pipeline(*args, **kwargs)

    @property
    def _uses_cfg(self) -> bool:
        return self.guider.null_weak_branch and self.guider.guidance_scale != 1.0

    def _check(self) -> None:
        # The guider and the denoisers. Not isinstance: a guider from the Hub brings its own copy of the class.
        guider, name = self.guider, type(self.pipeline).__name__
        if not hasattr(guider, "weak_ratio"):
            raise ValueError(f"Expected a SparseGuidance for {name}, got {type(guider).__name__}.")
        if self.guidance_transformer is self.pipeline.transformer:
            raise ValueError(
                "Expected another guidance_transformer than the pipeline's own transformer, got that one."
            )
        guider.check_denoisers(self.pipeline.transformer, self.guidance_transformer)

        # The pipeline's own guidance.
        if not self._uses_cfg:
            return
        if self.layout.cfg is None:
            raise ValueError(
                f"Expected null_weak_branch=False for {name}, got True: it has no classifier-free guidance whose two "
                "predictions could be told apart. Use Sparse Guidance alone."
            )
        if guider.guidance_scale < 1.0 or guider.guidance_rescale > 0.0:
            raise ValueError(
                f"Expected guidance_scale >= 1 and guidance_rescale=0 with null_weak_branch=True, got "
                f"{guider.guidance_scale} and {guider.guidance_rescale}: {name} itself combines the two predictions."
            )


class _GuidedSteps:
    """Answers the calls of the transformer in one sampling.

    Args:
        guided: The pipeline that samples.
        uses_cfg: Whether the pipeline runs its classifier-free guidance.
        generator: The `generator` of the call: one generator, one per image, or None.
    """

    def __init__(self, guided: GuidedPipeline, *, uses_cfg: bool, generator: Any):
        self.pipeline, self.layout = guided.pipeline, guided.layout
        self.denoisers = {"main": guided.pipeline.transformer, "guidance": guided.guidance_transformer}
        self.guider, self.uses_cfg, self.generator = copy.copy(guided.guider), uses_cfg, generator
        self.interval, self.step, self.calls = guided.guidance_interval, 0, 0
        self.guided_steps: list[int] = []
        self.num_rows: Any = None
        self.calls_per_step = 2 if uses_cfg and self.layout.cfg == "two calls" else 1

    def answer(self, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The transformer's output for these arguments; `run` is its own forward."""
        # A new step sets the branches.
        self.calls += 1
        if self.calls > self.calls_per_step:
            self._refuse_calls()
        if self.calls == 1:
            times = self.pipeline.scheduler.timesteps
            self.guider.set_state(step=self.step, num_inference_steps=len(times), timestep=times[self.step])
            if self.step == 0 and self.interval is not None:
                self.guided_steps = steps_inside(self.pipeline.scheduler, self.interval)
            is_guided = self.interval is None or self.step in self.guided_steps
            self.branches = self.guider.branches() if is_guided else [Branch()]

        # The answer.
        if not self.uses_cfg:
            return self._answer_once(run, args, kwargs)
        return (self._answer_one_of_two if self.calls_per_step == 2 else self._answer_both)(run, args, kwargs)

    def end_step(self) -> None:
        """Called before the scheduler's step."""
        if self.calls != self.calls_per_step:
            self._refuse_calls()
        self.step, self.calls = self.step + 1, 0

    def _answer_once(self, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The guided prediction: all branches have the prompt."""
        outputs = [self._run(branch, run, args, kwargs) for branch in self.branches]
        if len(outputs) == 1:
            return outputs[0]
        return _with_prediction(outputs[0], _combined(self.guider, [output[0] for output in outputs]))

    def _answer_one_of_two(self, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The strong branch for the first call of a step, the weak one for the second.

        In an unguided step it answers both with the first prediction: the pipeline's combination of equals returns it.
        """
        if self.calls == 1:
            self.first = self._run(self.branches[0], run, args, kwargs)
            return self.first
        return self.first if len(self.branches) == 1 else self._run(self.branches[1], run, args, kwargs)

    def _answer_both(self, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The strong branch in the half of the batch that has the prompt, the weak one in the other."""
        self._check_halves(next(iter([*args, *kwargs.values()])))
        halves = {"given": 0, "null": 1} if self.layout.cfg == "given first" else {"null": 0, "given": 1}
        outputs = {}
        for branch in self.branches:
            half = functools.partial(self._half, index=halves[branch.condition])
            inputs = {key: value if key in self.layout.shared else half(value) for key, value in kwargs.items()}
            outputs[branch.condition] = self._run(branch, run, [half(value) for value in args], inputs)
        given = outputs["given"]
        both = [outputs.get(condition, given)[0] for condition in halves]
        return _with_prediction(given, both[0] + both[1] if isinstance(both[0], list) else torch.cat(both))

    def _run(self, branch: Branch, run: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
        """The transformer's output for one branch."""
        # Routing, and the seed of the subset.
        denoiser = self.denoisers[branch.denoiser]
        run = run if branch.denoiser == "main" else denoiser
        if branch.selection_ratio == 0.0 and not hasattr(denoiser, "token_router"):
            return run(*args, **kwargs)
        settings = {"enabled": branch.selection_ratio > 0.0, "selection_ratio": branch.selection_ratio}
        if branch.selection_ratio > 0.0 and self.generator is not None:
            if get_token_router(denoiser).resolve().seed is None:
                latents = next(iter([*args, *kwargs.values()]))
                settings["seed"] = draw_routing_seed(self.generator, device=latents[0].device)

        # The forward. Copied: a CUDA graph of torch.compile overwrites its outputs in the next call.
        with token_routing(denoiser, **settings):
            output = run(*args, **kwargs)
        prediction = output[0]
        is_list = isinstance(prediction, list)
        return _with_prediction(output, [one.clone() for one in prediction] if is_list else prediction.clone())

    def _half(self, value: Any, index: int) -> Any:
        """One half of an argument that has an entry per sample; any other argument unchanged."""
        if isinstance(value, dict):
            return {name: self._half(entry, index) for name, entry in value.items()}
        if isinstance(value, list | tuple) and not self.layout.sample_lists:
            return type(value)(self._half(entry, index) for entry in value)
        has_samples = value.ndim > 0 if isinstance(value, torch.Tensor) else isinstance(value, list)
        if not has_samples or len(value) != self.num_rows:
            return value
        middle = self.num_rows // 2
        return value[middle:] if index else value[:middle]

    def _check_halves(self, latents: "torch.Tensor | list[torch.Tensor]") -> None:
        """Raises ValueError unless both halves of the batch are equal (checked once) and its size never changes."""
        middle = len(latents) // 2
        if self.num_rows is None:
            pairs = zip(latents[:middle], latents[-middle:], strict=True)
            is_twice = len(latents) == 2 * middle and all(torch.equal(one, other) for one, other in pairs)
            self.num_rows = len(latents) if is_twice else None
        if self.num_rows != len(latents):
            raise ValueError(
                f"Expected {type(self.pipeline).__name__} to run classifier-free guidance as one batch of two halves "
                f"in every step, got {len(latents)} samples. Leave out what switches it off, callbacks among them."
            )

    def _refuse_calls(self) -> None:
        raise ValueError(
            f"Expected {self.calls_per_step} calls of the transformer in a step of {type(self.pipeline).__name__}, "
            f"got {self.calls}. Leave out arguments that add predictions or leave some out (skipped layers, truncated "
            "guidance); with null_weak_branch=True some pipelines need a negative_prompt."
        )


class _Forward:
    """Set as the `forward` of a transformer: threads that sample with guidance get guided answers, others the model's
    own output."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.before = vars(module).get("forward")
        self.steps: dict[int, _GuidedSteps] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        steps = self.steps.get(threading.get_ident())
        return self.run(*args, **kwargs) if steps is None else steps.answer(self.run, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward from before."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # pipelines inspect it
        return inspect.signature(self.before or type(self.module).forward.__get__(self.module))


_LOCK = threading.Lock()


@contextmanager
def _forwards_answered(transformer: torch.nn.Module, steps: _GuidedSteps) -> Iterator[None]:
    """Sends this thread's calls of the transformer to `steps`; the last thread to leave restores the forward."""
    # Take over the forward.
    attributes, thread = vars(transformer), threading.get_ident()  # not setattr: torch.compile's wrapper redirects it
    with _LOCK:
        if not isinstance(attributes.get("forward"), _Forward):
            attributes["forward"] = _Forward(transformer)
        forward = attributes["forward"]
        if thread in forward.steps:
            raise ValueError("Expected a transformer that no GuidedPipeline of this thread is sampling with.")
        forward.steps[thread] = steps

    # Give it back.
    try:
        yield
    finally:
        with _LOCK:
            del forward.steps[thread]
            if not forward.steps and attributes.get("forward") is forward:
                _restore(attributes, "forward", forward.before)


@contextmanager
def _steps_counted(scheduler: Any, steps: _GuidedSteps) -> Iterator[None]:
    """Reports each scheduler step to `steps`, and passes the call's generators to it, which many pipelines do not."""
    attributes, step = vars(scheduler), scheduler.step
    before = attributes.get("step")
    given = {"generator": steps.generator} if "generator" in inspect.signature(step).parameters else {}

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.end_step()
        return step(*args, **given | kwargs)

    attributes["step"] = counted
    try:
        yield
    finally:
        _restore(attributes, "step", before)


def _restore(attributes: dict[str, Any], name: str, before: Any) -> None:
    if before is None:
        del attributes[name]
    else:
        attributes[name] = before


def _combined(guider: SparseGuidance, predictions: list[Any]) -> Any:
    """The guided prediction, computed in float32 and cast to the predictions' dtype; per sample if they are lists."""
    if isinstance(predictions[0], list):
        samples = zip(*predictions, strict=True)
        return [_combined(guider, [one.unsqueeze(0) for one in sample]).squeeze(0) for sample in samples]
    return guider.forward(*(one.float() for one in predictions))[0].to(predictions[0].dtype)


def _with_prediction(output: Any, prediction: Any) -> Any:
    """A transformer's output, a tuple or a dataclass, with its first entry replaced."""
    if isinstance(output, tuple):
        return prediction, *output[1:]
    return replace(output, **{fields(output)[0].name: prediction})
