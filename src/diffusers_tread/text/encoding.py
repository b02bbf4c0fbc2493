# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Encodes captions by a pipeline's own `encode_prompt`, as a batch, or one by one to be stored and collated later."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from ..fingerprint import weights_fingerprint


Encoded = dict[str, torch.Tensor]
"""An encoded caption: tensors without batch dimension, by their index in the output of `encode_prompt`."""

LENGTHS = ("max_sequence_length", "tokenizer_max_length")
"""Names of pipelines' arguments for the number of tokens of a caption."""


class PromptEncoder:
    """Encodes captions as a text-to-image pipeline of diffusers does, without a negative prompt.

    Args:
        pipeline: A pipeline with its tokenizers and text encoders; the other parts may be None.
        max_sequence_length: Maximal number of tokens of a caption, the rest is cut off; None for the default of the
            pipeline's `__call__`.
        call_options: Arguments of the pipeline's `__call__`; only those that it passes on to `encode_prompt` are used.

    Raises:
        ValueError: The pipeline has no `encode_prompt` of the usual kind, or a length is given that it cannot set.
    """

    def __init__(
        self, pipeline, *, max_sequence_length: int | None = None, call_options: Mapping[str, Any] | None = None
    ):
        self.pipeline, self.given = pipeline, (max_sequence_length, dict(call_options or {}))
        max_sequence_length, shared = _encoding_options(pipeline, *self.given)
        self.options = self._find_options(max_sequence_length, shared)
        one, two = self([""]), self(["", ""])
        self.axes = [_batch_axis(first, second) for first, second in zip(one, two, strict=True)]
        if not any(axis is not None for axis in self.axes):
            raise ValueError(
                f"Expected {type(pipeline).__name__}.encode_prompt to give tensors with an entry per prompt, got none."
            )
        self.common = one
        """Output for an empty prompt. Entries without a batch axis are the same for all prompts."""

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Any, ...]:
        """Returns the output of `encode_prompt` for captions, without its warnings about captions that are cut off."""
        import transformers

        loggers = [diffusers.utils.logging, transformers.utils.logging]
        verbosity = [logger.get_verbosity() for logger in loggers]
        try:
            for logger in loggers:
                logger.set_verbosity_error()
            encoded = self.pipeline.encode_prompt(captions, **self.options)
        finally:
            for logger, level in zip(loggers, verbosity, strict=True):
                logger.set_verbosity(level)
        return tuple(encoded) if isinstance(encoded, (tuple, list)) else (encoded,)

    def encode(self, captions: list[str]) -> list[Encoded]:
        """Encodes captions one by one, on the CPU, to be stored.

        Raises:
            ValueError: The pipeline returns masks only for some batches, so that its captions cannot be collated.
        """
        if self._drops_masks:
            raise ValueError(
                f"Expected a pipeline whose encoded captions can be stored one by one, got "
                f"{type(self.pipeline).__name__}, which gives a mask only where captions differ in length. Encode "
                "them in each step instead."
            )
        encoded, samples = self(captions), [{} for _ in captions]
        for place, (value, axis) in enumerate(zip(encoded, self.axes, strict=True)):
            for index, sample in enumerate(samples):
                if axis is not None:
                    one = value[index] if isinstance(value, list) else value.select(axis, index)
                    sample[str(place)] = one.contiguous().cpu()
        return samples

    def collate(self, samples: Sequence[Encoded], *, device: "torch.device | str") -> tuple[Any, ...]:
        """Collates captions from `encode`, in any dtype, to the output that `encode_prompt` would return.

        Shorter captions are padded with zeros.
        """
        values = list(self.common)
        for place, axis in enumerate(self.axes):
            if axis is not None:
                dtype = (values[place][0] if isinstance(values[place], list) else values[place]).dtype
                parts = [sample[str(place)].to(device, dtype, non_blocking=True) for sample in samples]
                values[place] = parts if isinstance(values[place], list) else torch.stack(_pad(parts), dim=axis)
        return tuple(values)

    def count_too_long(self, captions: Sequence[str]) -> int:
        """Number of captions that are cut off by the tokenizer with the longest limit."""
        names = [name for name in self.pipeline.components if name.startswith("tokenizer")]
        tokenizers = [one for name in names if (one := self.pipeline.components[name]) is not None]
        if not tokenizers:  # the pipeline has another name for it
            return 0
        limits = [self._limit(tokenizer) for tokenizer in tokenizers]
        longest = max(range(len(tokenizers)), key=limits.__getitem__)
        lengths = tokenizers[longest](list(captions), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > limits[longest] for ids in lengths)

    def identity(self) -> dict[str, Any]:
        """Everything the encoded captions depend on (JSON)."""
        return text_identity(self.pipeline, max_sequence_length=self.given[0], call_options=self.given[1])

    @cached_property
    def _drops_masks(self) -> bool:
        """Whether the pipeline returns no mask for a batch of equally long captions, as Qwen-Image does."""
        pairs = zip(self([""]), self(["", "a caption of several words"]), strict=True)
        return any(one is None and other is not None for one, other in pairs)

    def _limit(self, tokenizer) -> int:
        # CLIP's encoders have a fixed length, which no pipeline can change.
        asked = next((self.options[name] for name in LENGTHS if self.options.get(name)), tokenizer.model_max_length)
        return tokenizer.model_max_length if "CLIP" in type(tokenizer).__name__ else asked

    def _find_options(self, max_sequence_length: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `encode_prompt` besides the captions."""
        # Arguments that are required.
        kind = type(self.pipeline)
        if not hasattr(kind, "encode_prompt"):
            raise ValueError(f"Expected a text-to-image pipeline with encode_prompt, got {kind.__name__} without.")
        parameters = inspect.signature(kind.encode_prompt).parameters
        others = list(parameters.items())[2:]
        options: dict[Any, Any] = {
            name: None for name, one in others if one.default is one.empty and one.kind is not one.VAR_KEYWORD
        }

        # Defaults of `__call__`, such as the length or Sana's instruction, which may differ from `encode_prompt`'s.
        called = inspect.signature(kind.__call__).parameters
        shared = {name: called[name].default for name, _ in others if name in called and "prompt" not in name}
        options |= {name: default for name, default in shared.items() if default is not inspect.Parameter.empty}
        options |= given
        if "do_classifier_free_guidance" in parameters:
            options["do_classifier_free_guidance"] = False
        if "device" in parameters:
            options["device"] = self.pipeline.device

        # The length.
        name = next((name for name in LENGTHS if name in parameters), None)
        if max_sequence_length is not None and name is None:
            raise ValueError(
                f"Expected no max_sequence_length for {kind.__name__}, whose length is fixed, got "
                f"{max_sequence_length}. Leave it out."
            )
        if name is not None and max_sequence_length is not None:
            options[name] = max_sequence_length
        return options


def text_identity(
    pipeline, *, max_sequence_length: int | None, call_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything the results of a `PromptEncoder` depend on (JSON), except for its precision."""
    max_sequence_length, shared = _encoding_options(pipeline, max_sequence_length, call_options or {})
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    return {
        "pipeline_class": type(pipeline).__name__,
        "max_sequence_length": max_sequence_length,
        "text_encoders": {
            name: weights_fingerprint(part, rounded_to=torch.bfloat16)
            for name, part in parts.items()
            if part is not None
        },
    } | ({"call_options": shared} if shared else {})


def _encoding_options(
    pipeline, max_sequence_length: int | None, call_options: Mapping[str, Any]
) -> tuple[int | None, dict[str, Any]]:
    """The length of a caption, and the options of a pipeline's call that it passes on to `encode_prompt`.

    Raises:
        ValueError: Two different lengths are given.
    """
    kind, shared = type(pipeline), {}
    if hasattr(kind, "encode_prompt"):
        names = [set(inspect.signature(function).parameters) for function in (kind.encode_prompt, kind.__call__)]
        shared = {name: value for name, value in call_options.items() if name in names[0] & names[1]}
        shared = {name: value for name, value in shared.items() if "prompt" not in name}
    lengths = {shared.pop(name) for name in LENGTHS if name in shared} | {max_sequence_length}
    lengths -= {None}
    if len(lengths) > 1:
        raise ValueError(
            f"Expected one length of captions, got {sorted(lengths)} of max_sequence_length and the call's options. "
            "Leave one out."
        )
    return next(iter(lengths), None), shared


def _batch_axis(one: Any, two: Any) -> int | None:
    """The batch axis, found by comparing the outputs for one and for two prompts; None if there is none."""
    if isinstance(one, list):
        return 0
    if not isinstance(one, torch.Tensor):
        return None
    return next((axis for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)) if sizes == (1, 2)), None)


def _pad(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pads tensors [L, ...] with zeros to the length of the longest one."""
    longest = max(part.shape[0] if part.ndim else 0 for part in parts)
    return [
        part if part.ndim == 0 or len(part) == longest
        else F.pad(part, (0, 0) * (part.ndim - 1) + (0, longest - len(part)))
        for part in parts
    ]  # fmt: skip
