# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation found and everything it depends on, as a JSON file that a model card can be made from."""

import dataclasses
import datetime
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..files import write_json


_PACKAGES = ("diffusers-tread", "torch", "diffusers", "transformers", "clean-fid", "torch-fidelity", "timm", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a metric may depend on; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """The device of this process and how many processes there are."""
    state = PartialState()
    name = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else platform.machine()
    return {"device": state.device.type, "name": name, "num_processes": state.num_processes}


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """One evaluation.

    Raises:
        ValueError: Another format version.
    """

    metrics: dict[str, float]
    """Those that were computed: "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall"."""
    num_samples: int
    """Images that were judged."""
    images: dict[str, Any]
    """What was judged. For a pipeline: `name_or_path`, `revision`, `weights` (SHA-256 by component), `scheduler`,
    `num_inference_steps`, `guidance`, `labels`, `seed`; for a folder or file its name and hash."""
    feature_extractor: dict[str, str]
    """`name` and `fingerprint` of the network whose features were compared."""
    reference: dict[str, Any]
    """Name and hash of what the images were compared with."""
    batch_size: int
    """Images per forward. On most hardware sums are rounded differently with another one."""
    versions: dict[str, str] = field(default_factory=package_versions)
    """Of Python and the packages that took part, where they are installed."""
    hardware: dict[str, Any] = field(default_factory=describe_hardware)
    """Device and number of processes."""
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")  # noqa: UP017
    )
    """Of the end of the evaluation, UTC, ISO 8601."""
    format_version: int = 1
    """Of this description."""

    def __post_init__(self):
        if self.format_version != 1:
            raise ValueError(f"Expected results of format_version 1, got {self.format_version}.")

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaluationResults":
        """Undoes `to_dict`.

        Raises:
            ValueError: Missing or unknown entries, or another format version.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"Expected the entries of EvaluationResults, got others ({error}).") from error

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        write_json(Path(path), self.to_dict())


def load_results(path: str | Path) -> EvaluationResults:
    """Reads a results file.

    Raises:
        ValueError: It is not there or not of this format.
    """
    try:
        return EvaluationResults.from_dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a results file of examples/evaluate.py, got {path} ({error}).") from error
