# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Writes down operators as they run, with their FLOPs and the bytes that they read and write, alone and fused."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


MOVES = ("index", "gather", "scatter", "sort", "topk", "embedding")  # what names of operators begin with
FUSABLE = ("elementwise and norms", "casts of weights")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What one call of an operator costs. Two that are equal have the same name and sizes."""

    name: str
    kind: str
    """Its kernel class: "linear layers", "attention", "moving tokens", or one of FUSABLE."""
    flops: int
    bytes: int
    """Read and written, by itself."""
    fused_bytes: int = field(compare=False)
    """The part of it that stays when kernels are fused."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """A tensor that a call reads or writes: a view of memory."""

    storage: StorageWeakRef
    view: tuple
    bytes: int

    @classmethod
    def of(cls, values: Any) -> "list[Access]":
        """The tensors in nested arguments or results, each view once."""
        tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        return list(dict.fromkeys(map(cls._of_tensor, tensors)))

    @classmethod
    def _of_tensor(cls, tensor: torch.Tensor) -> "Access":
        # What is expanded lies in memory once.
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        return cls(
            storage=StorageWeakRef(tensor.untyped_storage()),
            view=(tensor.storage_offset(), *sorted(zip(tensor.stride(), tensor.shape, strict=True))),
            bytes=math.prod(sizes) * tensor.element_size(),
        )


@dataclass(frozen=True, kw_only=True)
class Call:
    name: str
    kind: str
    flops: int
    reads: list[Access]
    writes: list[Access]


class Recorder(TorchDispatchMode):
    """Writes down every operator that moves bytes.

    Args:
        weight_shapes: The shapes of the model's weights: what is cast and has one of them is a weight or its gradient.
    """

    def __init__(self, weight_shapes: Iterable[torch.Size] = ()):
        super().__init__()
        self.weight_shapes = set(weight_shapes)
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name, reads, writes = function._schema.name.split("::")[1], Access.of((args, kwargs)), Access.of(out)
        known = {read.storage for read in reads}
        reads = [] if name.startswith("new_") or name.endswith("_like") else reads  # of these the shape counts
        is_view = not function._schema.is_mutable and all(write.storage in known for write in writes)
        if not is_view and "empty" not in name:
            kind, flops = self._kind_and_flops(function, name, args, kwargs, out)
            self.calls.append(Call(name=name, kind=kind, flops=flops, reads=reads, writes=writes))
        return out

    def _kind_and_flops(self, function, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[str, int]:
        if "scaled_dot_product" in name:  # that of a CPU is not in torch's registry
            is_backward = name.endswith("backward")
            query, key = args[1:3] if is_backward else args[:2]
            return "attention", (5 if is_backward else 2) * 2 * query.numel() * key.shape[-2]
        if function.overloadpacket in flop_registry:
            return "linear layers", flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        if name == "_to_copy" and args[0].shape in self.weight_shapes:
            return "casts of weights", 0
        return "moving tokens" if name.lstrip("_").startswith(MOVES) else "elementwise and norms", 0

    def operators(self) -> list[Operator]:
        """The calls with what they cost by themselves and fused."""
        # A fused kernel is known by its depth: how many operators that are not fused lie before it.
        depths, made_at, kernel_of, used, used_outside = [], {}, {}, set(), set()
        for call in self.calls:
            fuses, depth = call.kind in FUSABLE, max((made_at.get(read.storage, 0) for read in call.reads), default=0)
            depths.append(depth)
            used |= {read.storage for read in call.reads}
            used_outside |= {one.storage for one in call.reads if not (fuses and kernel_of.get(one.storage) == depth)}
            for write in call.writes:
                made_at[write.storage] = depth if fuses else depth + 1
                kernel_of[write.storage] = depth if fuses else None

        # What a kernel made or read already it does not read; what it alone uses it does not write.
        operators, read_already = [], set()
        for call, depth in zip(self.calls, depths, strict=True):
            moved = fused = [*call.reads, *call.writes]
            if call.kind in FUSABLE:
                new = [one for one in call.reads if kernel_of.get(one.storage) != depth]
                new = [one for one in new if (depth, one) not in read_already]
                read_already |= {(depth, one) for one in new}
                fused = new + [one for one in call.writes if one.storage in used_outside or one.storage not in used]
            sizes = {"bytes": sum(one.bytes for one in moved), "fused_bytes": sum(one.bytes for one in fused)}
            operators.append(Operator(name=call.name, kind=call.kind, flops=call.flops, **sizes))
        return operators
