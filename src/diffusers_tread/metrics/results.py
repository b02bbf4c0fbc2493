# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Results of an evaluation and everything they depend on, as a JSON file that model cards are made from."""

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

from ..field_docs import with_field_docs
from ..files import write_json
from .registry import check_values, value_label


_PACKAGES = ("diffusers-tread", "torch", "diffusers", "transformers", "clean-fid", "torch-fidelity", "timm", "numpy")


def package_versions() -> dict[str, str]:
    """Lists the versions of Python and of the installed packages that a metric may depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Describes the device of this process and the number of processes."""
    state = PartialState()
    name = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else platform.machine()
    return {"device": state.device.type, "name": name, "num_processes": state.num_processes}


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """Results of one evaluation.

    Raises:
        ValueError: The format version is unknown, or a value is not finite.
    """

    metrics: dict[str, float]
    """Values by name: those of `METRICS`, and `<name>_std` for a metric that is computed on parts of the images; the
    mean `<name>_score` of each scorer, and `<name>_score_standard_error`."""
    num_samples: int
    """Number of images that were judged."""
    images: dict[str, Any]
    """Description of the judged images. For a pipeline: `name_or_path`, `revision`, `weights` (SHA-256 by component),
    `scheduler`, `num_inference_steps`, `guidance`, `labels`, `seed`; for a text-to-image pipeline, `prompts` (their
    number and hash) instead of labels; for a folder or file, its name and hash."""
    feature_extractor: dict[str, str]
    """`name` and `fingerprint` of the network whose features were compared; only the name "none" without one."""
    reference: dict[str, Any]
    """Name and hash of the reference; only the name "none" without one."""
    batch_size: int
    """Images per forward pass. On most hardware, rounding depends on it."""
    scorers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Description that identifies each scorer, by its name."""
    versions: dict[str, str] = field(default_factory=package_versions)
    """Versions of Python and of the installed packages."""
    hardware: dict[str, Any] = field(default_factory=describe_hardware)
    """Device and number of processes."""
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")  # noqa: UP017
    )
    """End of the evaluation in UTC, ISO 8601."""
    format_version: int = 1
    """Version of this format."""

    def __post_init__(self):
        if self.format_version != 1:
            raise ValueError(f"Expected results of format_version 1, got {self.format_version}.")
        check_values(self.metrics)

    def label(self, name: str) -> str:
        """Finds the label of a value for tables and cards, such as "FID"."""
        return value_label(name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaluationResults":
        """Makes results from the content of a file.

        Raises:
            ValueError: Entries are missing or unknown, or the format version is unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"Expected the entries of EvaluationResults, got others ({error}).") from error

    def save(self, path: str | Path) -> None:
        """Writes the file atomically."""
        write_json(Path(path), self.to_dict())


def load_results(path: str | Path) -> EvaluationResults:
    """Reads a results file.

    Raises:
        ValueError: The file is missing or has another format.
    """
    try:
        return EvaluationResults.from_dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a results file of examples/evaluate_tread.py, got {path} ({error}).") from error
