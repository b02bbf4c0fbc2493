# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Measures the FID of a run's samples at several steps, and records and plots it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..files import write_json
from ..metrics import FeatureExtractor, ImageSource, check_metrics, evaluate_images, prepare_reference
from ..pictures import save_curve


RECORDS, STORE, PICTURE = "metrics.json", "eval", "samples/fid.png"

logger = logging.getLogger(__name__)


class FIDCurve:
    """Measures samples against one reference. All processes create it, and call `measure`, together.

    It writes `metrics.json` with one record per measurement, `samples/fid.png` and, if the reference is a set of
    images, their features in `eval`.

    Args:
        accelerator: The run's accelerator.
        output_dir: The run's folder, shared by all processes.
        step: The step that the run goes on from; records of later steps are dropped.
        extractor: The network whose features are compared.
        reference: An `.npz` file with statistics or images, or a folder of images.
        image_size: Height and width of the samples in pixels; images of the reference must have the same size.
        num_samples: Samples per measurement, over all processes.
        batch_size: Samples per process and forward pass.
        sampling: How the samples are made, for the records.

    Raises:
        ValueError: The reference is missing or was made with another extractor or image size; too few samples.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        *,
        step: int,
        extractor: FeatureExtractor,
        reference: str,
        image_size: tuple[int, int],
        num_samples: int,
        batch_size: int,
        sampling: dict[str, Any],
    ):
        self.accelerator, self.output_dir, self.extractor = accelerator, Path(output_dir), extractor
        self.sampling = {"num_samples": num_samples, **sampling}
        self.batch_size = batch_size
        check_metrics(("fid",), extractor, num_samples=num_samples)
        self.reference = prepare_reference(
            reference,
            extractor=extractor,
            metrics=("fid",),
            batch_size=batch_size,
            store_dir=self.output_dir / STORE,
            image_size=image_size,
        )
        records = _read_records(self.output_dir / RECORDS) if accelerator.is_main_process else []
        self.records = [record for record in broadcast_object_list([records])[0] if record["step"] <= step]

    def has(self, step: int) -> bool:
        """Whether this step has been measured, now or before the run was resumed."""
        return any(record["step"] == step for record in self.records)

    def measure(self, samples: ImageSource, *, step: int) -> float:
        """Measures and records the FID of `samples`, which must be the same in each process.

        Returns:
            The FID, the same value in each process.
        """
        # Measure.
        store = self.output_dir / STORE / f"step-{step:07d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(store, ignore_errors=True)  # left by a run that was killed here
        self.accelerator.wait_for_everyone()
        values = evaluate_images(
            samples,
            extractor=self.extractor,
            reference=self.reference,
            batch_size=self.batch_size,
            store_dir=store,
        )
        (fid,) = broadcast_object_list([values and values["fid"]])

        # Write the record last: without it, a resumed run measures again.
        extractor = {"feature_extractor": self.extractor.name, "reference": self.reference.description}
        self.records.append({"step": step, "fid": fid, **self.sampling, **extractor})
        if self.accelerator.is_main_process:
            shutil.rmtree(store)
            points = [(record["step"], record["fid"]) for record in self.records]
            save_curve(points, self.output_dir / PICTURE, x_label="optimiser steps", y_label="FID")
            write_json(self.output_dir / RECORDS, self.records)
        self.accelerator.wait_for_everyone()
        return fid


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The measurements in a file; none, with a warning, if the file is damaged."""
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record["step"], int) and isinstance(record["fid"], float) for record in records):
            return list(records)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning(f"Skipping {path}, which is damaged: the FID of steps before this one is left out of the curve.")
    return []
