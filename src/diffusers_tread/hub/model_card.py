# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The model card of a pipeline: its README.md on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any, Protocol

import PIL.Image
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..field_docs import with_field_docs
from ..fingerprint import weights_fingerprint
from ..flops import forward_flops, guidance_flops
from ..installation import how_to_install
from ..markdown import as_code, as_text, table_row
from ..routing import get_token_router


SAMPLES = "samples.png"
_ROUTE_TAGS = ("tread", "token-routing", "sparse-guidance")
_WITH_ROUTES = """\
A class-conditional diffusion transformer for token routing ([TREAD](https://arxiv.org/abs/2501.04765)): in training, a
random share of the tokens skips the middle blocks; in sampling, all take them, unless
[Sparse Guidance](https://arxiv.org/abs/2601.01608) makes a guide of the difference."""
_WITHOUT_ROUTES = "A class-conditional diffusion transformer ([DiT](https://arxiv.org/abs/2212.09748))."
_UNKNOWN_LICENSE = "Not stated. The code in this repository is under the Apache License, Version 2.0."
_TASK = "unconditional-image-generation"
# Settings of the training scripts to show, with their labels; none of them reveals details of the machine.
TRAINING_SETTINGS = {
    "objective": "objective",
    "max_train_steps": "optimiser steps",
    "total_batch_size": "images per step",
    "num_images": "training images",
    "learning_rate": "learning rate",
    "lr_scheduler": "learning rate schedule",
    "lr_warmup_steps": "warm-up steps",
    "dense_fraction": "last share of the steps, without routing",
    "class_dropout_prob": "labels dropped",
    "proportion_empty_prompts": "captions dropped",
    "use_ema": "averaged weights",
    "ema_decay": "decay of the average",
    "mixed_precision": "mixed precision",
    "num_processes": "processes",
    "seed": "seed",
}


class Evaluation(Protocol):
    """The parts of `diffusers_tread.metrics.EvaluationResults` that a card shows; see there for details."""

    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def images(self) -> dict[str, Any]: ...
    @property
    def feature_extractor(self) -> dict[str, str]: ...
    @property
    def reference(self) -> dict[str, Any]: ...

    def label(self, name: str) -> str: ...


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """Details for a model card that the pipeline does not tell."""

    license: str | None = None
    """Licence by its name on the Hub, such as "apache-2.0"; None if it is not stated."""

    dataset: str | None = None
    """Training data, "organisation/name" for a data set on the Hub."""

    samples: PIL.Image.Image | None = None
    """A picture of samples."""

    step: int | None = None
    """Optimiser steps so far, for a run that is still training; None for a finished one."""

    training: Mapping[str, Any] | None = None
    """Settings of the run, as in train_tread.py's `train_config.json`."""

    results: Sequence[Evaluation] = ()
    """Evaluations of these weights, from `load_results`."""


def model_card(pipeline: DiffusionPipeline, *, repo_id: str, details: CardDetails | None = None) -> ModelCard:
    """Writes the card: what the pipeline is, how to load it, how it was trained, and metadata for the Hub.

    Args:
        pipeline: The pipeline to describe.
        repo_id: The repository that the card is for, or a folder.
        details: Details that the pipeline does not tell.

    Raises:
        ValueError: Evaluation results are for other weights.
    """
    # Facts.
    details = details or CardDetails()
    _check_results(pipeline, details.results)
    title = repo_id.rstrip("/").split("/")[-1]
    has_routes = bool(get_token_router(pipeline.transformer).routes)
    about = _WITH_ROUTES if has_routes else _WITHOUT_ROUTES
    if pipeline.transformer.config.num_classes == 0:
        about = about.replace("A class-conditional", "An unconditional")
    names = list((pipeline.config.id2label or {}).values())
    is_on_hub = details.dataset is not None and details.dataset.count("/") == 1

    # Metadata.
    data = ModelCardData(
        license=details.license,
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["diffusers", "diffusers-tread", "class-conditional", *(_ROUTE_TAGS if has_routes else ())],
        datasets=[details.dataset] if is_on_hub else None,
        model_name=title,
        eval_results=[result for one in details.results for result in _eval_results(one, details)] or None,
    )

    # Text.
    text = Template(files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")).substitute(
        title=as_text(title),
        install=how_to_install(),
        repo_id=as_code(repo_id),
        about=about,
        samples=f"\n![Samples]({SAMPLES})\n" if details.samples is not None else "",
        facts=_rows(_facts(pipeline, details)),
        names=f" and names, such as {as_text(repr(names[0]))}" if names else "",
        training=training_table(details),
        evaluation=_evaluation(details.results),
        license=_UNKNOWN_LICENSE if details.license is None else as_text(details.license),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _facts(pipeline: DiffusionPipeline, details: CardDetails) -> dict[str, str]:
    """The facts that the pipeline itself tells."""
    # Model and routes.
    model, vae, guider = pipeline.transformer, pipeline.vae, pipeline.guider
    config, size = model.config, model.config.sample_size * pipeline.vae_scale_factor
    router = get_token_router(model)
    dense, routed = forward_flops(model, selection_ratio=0.0).total, forward_flops(model).total
    routes = [
        f"blocks {route.start} to {route.end} of {router.num_layers} (from 0, both included) without "
        f"{route.selection_ratio:.0%} of the {route.unit}s{', fused after them' if route.rejoin == 'fuse' else ''}"
        for route in router.routes
    ]

    # The table.
    facts = {
        "images": f"{size}x{size} pixels, {config.num_classes or 'no'} classes",
        "trained on": details.dataset or "not stated",
        "parameters": f"{model.num_parameters():,}",
        "objective": config.objective or "not stated",
        "VAE": "none, the model works on pixels" if vae is None else type(vae).__name__,
        "routes": "; ".join(routes) or "none",
        "FLOPs per image and forward": f"{dense:.3e} dense, {routed:.3e} routed; a multiply-add is two",
        "sampler": type(pipeline.scheduler).__name__,
        "guidance": "none unless guidance_scale is given" if guider is None else type(guider).__name__,
    }
    if guider is not None:
        cost = guidance_flops(model, guider, guidance_model=pipeline.guidance_transformer)
        settings = ", ".join(f"{name} {value}" for name, value in guider.config.items() if name[0] != "_")
        facts["guidance"] += f" ({settings}): {cost.share_of_cfg:.0%} of the FLOPs of dense classifier-free guidance"
    if details.step is not None:
        facts["state"] = f"{details.step} optimiser steps of a training that goes on"
    return facts


def training_table(details: CardDetails) -> str:
    """The section with the run's settings; empty if they are not known."""
    if details.training is None:
        return ""
    known = {label: details.training.get(name) for name, label in TRAINING_SETTINGS.items()}
    rows = _rows({label: str(value) for label, value in known.items() if value is not None})
    return f"\n## Training\n\n| | |\n|---|---|\n{rows}\n"


def _evaluation(results: Sequence[Evaluation]) -> str:
    if not results:
        return ""
    columns = ("metric", "value", "samples", "reference", "network", "sampling")
    lines = ["", "## Evaluation", "", table_row(*columns), "|---" * len(columns) + "|"]
    for one in results:
        sampling = ", ".join(f"{name} {value}" for name, value in _sampling(one).items())
        for name, value in one.metrics.items():
            cells = (one.label(name), f"{value:.4g}", f"{one.num_samples:,}", one.reference["name"])
            lines.append(table_row(*cells, one.feature_extractor["name"], sampling))
    return "\n".join([*lines, ""])


def _eval_results(results: Evaluation, details: CardDetails) -> list[EvalResult]:
    """The results for the metadata `model-index`."""
    arguments = {"num_samples": results.num_samples, "feature_extractor": results.feature_extractor["name"]}
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=details.dataset or results.reference["name"],
            dataset_name=results.reference["name"],
            metric_type=name,
            metric_name=results.label(name),
            metric_value=value,
            metric_args=arguments | _sampling(results),
        )
        for name, value in results.metrics.items()
    ]


def _sampling(results: Evaluation) -> dict[str, Any]:
    """How the samples were made; empty if the images are not from a pipeline."""
    images = results.images
    found = {"scheduler": images["scheduler"]["class"]} if "scheduler" in images else {}
    names = ("num_inference_steps", "guidance", "labels", "seed")
    return found | {name: images[name] for name in names if name in images}


def _check_results(pipeline: DiffusionPipeline, results: Sequence[Evaluation]) -> None:
    """Raises ValueError for results of other weights. They are only compared if the precision is the same."""
    for one in results:
        for name, fingerprint in one.images.get("weights", {}).items():
            part = pipeline.components.get(name)
            same_dtype = part is not None and one.images["dtype"][name] == str(part.dtype).removeprefix("torch.")
            if part is None or (same_dtype and weights_fingerprint(part) != fingerprint):
                raise ValueError(
                    f"Expected results of this pipeline, got those of {one.images.get('name_or_path')} with "
                    f"{'other weights of' if part is not None else 'a'} {name}. Evaluate this pipeline."
                )


def _rows(cells: Mapping[str, str]) -> str:
    return "\n".join(table_row(name, value) for name, value in cells.items())
