# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Reads other projects' checkpoints without running their code, and removes prefixes from the weights' names."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


# Every DiT has this weight; the part of its name before it is the prefix of a set of weights.
_ANCHOR = "x_embedder.proj.weight"
# DiT's and SiT's training scripts save their command line with the weights: a namespace of plain values.
_ALLOWED = [argparse.Namespace]


@dataclass(frozen=True, kw_only=True, eq=False)
class DiTWeights:
    """The content of a checkpoint."""

    tensors: dict[str, torch.Tensor]
    """One set of weights, under DiT's names, on the CPU."""
    settings: dict[str, Any]
    """Settings of the training: DiT's, SiT's and REPA's scripts save them as `args`, LightningDiT's as `config`, in
    sections. Empty if there are none."""


def read_dit_weights(
    checkpoint: str | Path, *, weights: str | None = None, allow_unsafe_pickle: bool = False
) -> DiTWeights:
    """Reads one set of DiT weights from a file, under DiT's names.

    A training checkpoint may hold several sets (raw and averaged weights), nested, or with the prefixes of EDM's
    preconditioning ("model."), data parallelism ("module.") and `torch.compile` ("_orig_mod.").

    Args:
        checkpoint: A `.safetensors` file, or one written by `torch.save`.
        weights: Which set, such as "ema" or "model"; None for the only one or, among several, the averaged one.
        allow_unsafe_pickle: Whether to read a pickle that does more than hold tensors. It can run any code.

    Raises:
        ValueError: The file does not exist, is not a checkpoint or is a pickle that could run code; or the set of
            weights is missing or ambiguous.
    """
    content = _load(Path(checkpoint), allow_unsafe_pickle=allow_unsafe_pickle)
    tensors = _flatten(content)
    prefixes = [name.removesuffix(_ANCHOR) for name in tensors if name.endswith(_ANCHOR)]
    prefix = _choose(prefixes, weights, tensors)
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return DiTWeights(tensors=chosen, settings=_settings(content))


def _settings(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {}
    settings, sections = content.get("args", {}), content.get("config", {})
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    for section in ("data", "transport"):
        values = sections.get(section, {}) if isinstance(sections, Mapping) else {}
        settings |= values if isinstance(values, Mapping) else {}
    return settings


def _load(path: Path, *, allow_unsafe_pickle: bool) -> Any:
    if not path.is_file():
        raise ValueError(f"Expected a checkpoint file, got {path}, which is none. Download it first.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(
                path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=not allow_unsafe_pickle
            )
    except Exception as error:  # unpickling other bytes may raise any error
        refused = isinstance(error, pickle.UnpicklingError) and not allow_unsafe_pickle
        reason = _unsafe_contents(path) if refused else f": {type(error).__name__}: {error}"
        raise ValueError(
            f"Expected tensors alone, in a file of torch.save or safetensors, got {path}{reason}"
        ) from error


def _unsafe_contents(path: Path) -> str:
    with torch.serialization.safe_globals(_ALLOWED):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    return (
        f"{' with ' if names else ''}{', '.join(names[:10])}. If it is a pickle that does more, it can run any code, "
        "and was not read. If you trust whoever made it, allow_unsafe_pickle=True (--allow_unsafe_pickle) reads it."
    )


def _flatten(content: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Flattens nested mappings to tensors under dotted names, and removes the prefix of `torch.compile`."""
    if isinstance(content, torch.Tensor):
        return {prefix.removesuffix(".").replace("_orig_mod.", ""): content}
    if not isinstance(content, Mapping):
        return {}
    tensors = {}
    for name, value in content.items():
        tensors |= _flatten(value, f"{prefix}{name}.")
    return tensors


def _choose(prefixes: list[str], weights: str | None, tensors: dict[str, torch.Tensor]) -> str:
    """Finds the prefix of the set of weights that is called `weights`."""
    if not prefixes:
        raise ValueError(
            f"Expected the weights of a DiT, with {_ANCHOR}, got {sorted(tensors)[:10] or 'no tensors'}. Is it "
            "another architecture?"
        )
    names = {prefix.removesuffix("."): prefix for prefix in prefixes}
    if weights is None:
        chosen = list(names) if len(names) == 1 else [name for name in names if "ema" in re.split("[._]", name)]
    else:
        chosen = [name for name in names if name == weights] or [n for n in names if n.split(".")[0] == weights]
    if len(chosen) != 1:
        raise ValueError(
            f"Expected weights to name one of {sorted(names)}, got {weights!r}. Give weights=… (--weights), "
            "or leave it out where there is one."
        )
    return names[chosen[0]]
