# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reads other people's checkpoints: no code of theirs runs, and wrappers around the weights' names are taken off."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


# Every DiT has it; what stands before it is the prefix of a set of weights.
_ANCHOR = "x_embedder.proj.weight"


def read_dit_weights(
    checkpoint: str | Path, *, weights: str | None = None, allow_unsafe_pickle: bool = False
) -> dict[str, torch.Tensor]:
    """One set of DiT weights from a file, under the names that DiT gives them.

    A training checkpoint may hold several sets (raw and averaged weights), nested, or behind the prefixes of EDM's
    preconditioning ("model."), data parallelism ("module.") and `torch.compile` ("_orig_mod.").

    Args:
        checkpoint: A `.safetensors` file, or what `torch.save` wrote.
        weights: Which set, such as "ema" or "model"; None for the only one or, among several, the averaged one.
        allow_unsafe_pickle: Whether to read a pickle that does more than hold tensors: it can run any code.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        ValueError: No such file, not a checkpoint, a pickle that could run code, or no set of weights to choose.
    """
    tensors = _flatten(_load(Path(checkpoint), allow_unsafe_pickle=allow_unsafe_pickle))
    prefixes = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    prefix = _choose(prefixes, weights, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load(path: Path, *, allow_unsafe_pickle: bool) -> Any:
    if not path.is_file():
        raise ValueError(f"Expected a checkpoint file, got {path}, which is none. Download it first.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # DiT's and SiT's training scripts save their command line beside the weights: attributes of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=not allow_unsafe_pickle
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected a pickle of tensors alone, got {path}{_describe_globals(path)}. It can run any code, and was "
            "not read. If you trust whoever made it, allow_unsafe_pickle=True (--allow_unsafe_pickle) reads it."
        ) from error
    except (RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise ValueError(f"Expected a file of torch.save or safetensors, got {path}: {error}") from error


def _describe_globals(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        return ""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return f" with {', '.join(names[:10])}" if names else ""


def _flatten(content: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested mappings under dotted names, without those that `torch.compile` puts in between."""
    if isinstance(content, torch.Tensor):
        return {prefix.removesuffix(".").replace("_orig_mod.", ""): content}
    if not isinstance(content, Mapping):
        return {}
    tensors = {}
    for name, value in content.items():
        tensors |= _flatten(value, f"{prefix}{name}.")
    return tensors


def _choose(prefixes: list[str], weights: str | None, tensors: dict[str, torch.Tensor]) -> str:
    """The prefix of the set of weights that is called `weights`."""
    if not prefixes:
        raise ValueError(
            f"Expected the weights of a DiT, with {_ANCHOR}, got {sorted(tensors)[:10] or 'no tensors'}. Is it "
            "another architecture?"
        )
    names = {prefix.removesuffix("."): prefix for prefix in prefixes}
    if weights is None:
        chosen = list(names) if len(names) == 1 else [name for name in names if "ema" in name.split(".")[0]]
    else:
        chosen = [name for name in names if name == weights] or [n for n in names if n.split(".")[0] == weights]
    if len(chosen) != 1:
        raise ValueError(
            f"Expected weights to name one of {sorted(names)}, got {weights!r}. Give weights=… (--weights)."
        )
    return names[chosen[0]]
