# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The types of specs for blocks and models.

A spec says which argument holds the tokens, which output they are, and which other arguments have an entry per token.
Specs are keyed by class name and found through the MRO, because FSDP2 replaces a module's class by a subclass of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from ...field_docs import with_field_docs


class Window(NamedTuple):
    """The routable tokens of a stream: `length` of them from `start` on. All others are always kept."""

    start: "int | torch.Tensor"
    """0-based; negative counts from the end of the stream; a tensor [B] gives each sample its own."""

    length: int


Axis = int | tuple[int, ...] | Mapping[int, int]


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """How to run a block on a subset of its tokens.

    Example:
        >>> from diffusers_tread import BlockSpec, register_block_spec
        >>> register_block_spec("MyBlock", BlockSpec(output=1, tokens={"image_rotary_emb": 0}, text="first"))
    """

    hidden: str = "hidden_states"
    """The argument that holds the routable tokens, [B, L, D]."""

    output: int = 0
    """Index of the tokens in the returned tuple; ignored for blocks that return a tensor."""

    tokens: Mapping[str, Axis] = field(default_factory=dict)
    """The other arguments with an entry per token, and their token axis. Axis 0 means that there is no batch axis. A
    tuple gives several axes (a mask [B, 1, L, L]: (2, 3)); a mapping gives the axis by number of dimensions and leaves
    tensors of other ranks unchanged (a modulation [B, L, 6, D] that may also be [B, 6, D]: {4: 1}). "name.0" or
    "name.key" selects from a tuple or dict; without it all tensors inside are meant. Axes of length 1 are unchanged:
    they broadcast."""

    text: Literal["first", "last"] | None = None
    """Position of the text in arrays that cover text and image. None: no argument covers both."""

    joint: bool = False
    """Whether the block's own stream holds both text and image."""

    sequence_first: bool = False
    """Whether the stream is [L, B, D]. Token axis 0 of other arguments then means [L, B, ...] too."""

    keep_first: str | None = None
    """An integer argument: that many tokens at the start of the stream are conditions and never routed."""

    window_mask: str | None = None
    """An argument [B, L] that is 1 on the routable tokens, which are contiguous."""

    num_rows: str | None = None
    """An integer argument, or "name.1" for one in a tuple: the number of rows of the token grid, over which the block
    convolves, shifts or scans. Then only whole rows can be routed, and the block gets the number of kept rows."""

    must_be_none: tuple[str, ...] = ()
    """Arguments that address tokens by position. The block cannot be routed when they are given."""

    objection: Callable[[torch.nn.Module, Callable[[str], Any]], str | None] | None = None
    """Returns why a call cannot be routed, or None, from the block and a function that gives its arguments by name."""

    newer: tuple[str, ...] = ()
    """Arguments that the block lacks in the oldest supported diffusers."""

    needs_shared_subset: bool = False
    """Whether an argument without a batch axis is used as an index, so that all samples must keep the same tokens."""

    @cached_property
    def gathers(self) -> tuple[tuple[str, tuple[str, ...], Axis], ...]:
        """(argument, path inside it, axis) for each entry of `tokens`."""
        return tuple((key.split(".")[0], tuple(key.split(".")[1:]), axis) for key, axis in self.tokens.items())

    @property
    def argument_names(self) -> set[str]:
        """The arguments that the block must have."""
        rows = None if self.num_rows is None else self.num_rows.split(".")[0]
        optional = [name for name in (self.keep_first, self.window_mask, rows) if name is not None]
        named = {self.hidden, *optional, *self.must_be_none, *(name for name, _, _ in self.gathers)}
        return named - set(self.newer)


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Facts about a model that the specs of its blocks do not give."""

    stacks: tuple[str, ...] | None = None
    """The main stacks, in the order they run. None: those attributes of `MAIN_STACKS` that the model has."""

    window: Callable[[torch.nn.Module, Mapping[str, Any]], Window | None] | None = None
    """Returns where the routable tokens lie in the blocks' stream, from the model and its forward's arguments."""

    grid: Callable[[torch.nn.Module, Mapping[str, Any]], tuple[int, ...]] | None = None
    """Returns the grid of the routable tokens in raster order, from the model and its forward's arguments, for routes
    of rows: (rows, columns) or (frames, rows, columns). None: the grid is unknown."""

    must_be_none: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the model's forward that routing does not support, and why."""


def find_by_class(table: Mapping[str, Any], module: torch.nn.Module, *, stack: str = "") -> Any:
    """The entry for the nearest class of the module's MRO, one for this stack ("Class/stack") before a general one."""
    for cls in type(module).__mro__:
        for name in (f"{cls.__name__}/{stack}", cls.__name__):
            if name in table:
                return table[name]
    return None
