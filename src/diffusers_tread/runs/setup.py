# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a training script sets up from its config before the first step."""

import dataclasses
import inspect
import json
import math
import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ..data import TrainingSource, open_source
from ..flops import block_flops_saved
from ..installation import require
from ..metrics import FeatureExtractor, load_feature_extractor
from ..models import DENOISERS, TREADTransformer2DModel, denoiser_class, make_denoiser
from ..objectives import LOSS_TERMS, LossTerm, Objective, find_objective
from ..objectives.flow import dimension_shift
from ..routing import TokenRoute
from ..seeds import derive_seed
from .config import CONTROL_FIELDS, RunConfig, TrainConfig
from .optimizers import Groups, make_optimizer
from .parsing import read_json


def make_accelerator(config: RunConfig) -> Accelerator:
    """Makes an `Accelerator` for one process, DDP or FSDP2, whose trackers write into the run's folder.

    Raises:
        ValueError: Another kind of parallelism is configured, or the tracker is not installed.
    """
    if config.report_to not in ("none", "all") and find_spec(config.report_to) is None:
        raise ValueError(
            f"Expected an installed tracker for --report_to, got {config.report_to!r}. Do `pip install "
            f"{config.report_to}`, or say --report_to none."
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        # A plugin, because the environment of `accelerate launch` overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )

    # A run makes its model several times: on the meta device to describe it, to train and to save it.
    warnings.filterwarnings("once", message="The route ends at block")

    # Refuse other kinds of parallelism.
    refused = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    is_fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if accelerator.distributed_type in refused or is_fsdp1:
        raise ValueError(
            f"Expected one process, DDP or FSDP2, got {'FSDP1' if is_fsdp1 else accelerator.distributed_type.value}. "
            "For FSDP set `fsdp_version: 2` in the accelerate config."
        )
    return accelerator


def init_trackers(accelerator: Accelerator, config: RunConfig, settings: dict[str, Any]) -> None:
    """Starts the trackers of a run, whose files go to `logs` in its folder."""
    if config.report_to == "none":
        return
    logs = Path(config.output_dir, "logs")
    logs.mkdir(parents=True, exist_ok=True)
    if config.report_to in ("trackio", "all"):  # trackio takes no folder as an argument
        os.environ.setdefault("TRACKIO_DIR", str(logs / "trackio"))
    scalars = {key: value for key, value in settings.items() if isinstance(value, (str, int, float))}
    accelerator.init_trackers(config.tracker_project_name, scalars, init_kwargs={"wandb": {"dir": str(logs)}})


class UnseenSource(TrainingSource):
    """Stands in for data that a dry run does not open: their shapes and number of classes, from the config."""

    def __init__(self, config: TrainConfig):
        if None in (config.resolution, config.num_classes):
            raise ValueError(
                f"Expected --resolution and --num_classes for a --dry_run without the data, got "
                f"{config.resolution} and {config.num_classes}, and no data at {config.data}."
            )
        self.has_images = not config.data.startswith("latents:")
        is_latent = not self.has_images or config.pretrained_vae_name_or_path is not None
        side: Any = config.resolution
        self.num_classes, self.resolution, self.name, self.vae = config.num_classes, side, None, None
        self.id2label = {}
        self.buckets, self.has_captions, self.info = config.buckets(), False, None
        # The latents that the preset is made for, else those of Stable Diffusion's VAEs.
        kind = None if config.preset is None else denoiser_class(config.preset)
        known = kind.preset_config(config.preset) if hasattr(kind, "preset_config") else {}
        latents = known.get("in_channels", 4), known.get("sample_size", side // 8)
        self.channels, self.latent_size = latents if is_latent else (3, side)

    def __len__(self) -> int:
        raise TypeError("Expected a length of data that were not opened.")


def open_data(config: RunConfig, accelerator: Accelerator) -> TrainingSource:
    """Opens the data of a run; a dry run opens only data on this machine."""
    kind, _, name = config.data.partition(":")
    if config.dry_run and kind in ("folder", "hub", "latents") and not Path(name).exists():
        return UnseenSource(config)
    with accelerator.main_process_first():  # one process fills the cache of `datasets`
        source = open_source(config.data, **config.data_options())
    if source.vae is not None:
        source.vae.to(accelerator.device)
    return source


def objective_fields(config: RunConfig, source: TrainingSource | None) -> dict[str, Any]:
    """The fields of --objective_config, with the shift "auto" replaced by the number for the source's latents.

    With buckets, the number is for their mean area.

    Raises:
        ValueError: The shift is "auto" and there is no source.
    """
    fields = read_json(config.objective_config)
    if fields.get("shift") != "auto":
        return fields
    if source is None:
        raise ValueError(
            'Expected a number for shift in --objective_config of a text-to-image run, got "auto", whose scheduler is '
            "made before the data are opened. Give sqrt(C H W / 4096) of the latents."
        )
    area = sum(height * width for height, width in source.sizes) / len(source.sizes)  # in pixels
    return fields | {"shift": dimension_shift(source.channels * area * (source.latent_size / source.resolution) ** 2)}


def make_objective(config: RunConfig, source: TrainingSource | None) -> Objective:
    """Makes the objective for a source, see `objective_fields`. Raises ValueError for unknown fields."""
    fields, kind = objective_fields(config, source), find_objective(config.objective)
    if unknown := sorted(set(fields) - set(inspect.signature(kind).parameters)):
        raise ValueError(f"Expected fields of {kind.__name__} in --objective_config, got {unknown}.")
    return kind(**fields)


def make_terms(config: TrainConfig, model: torch.nn.Module, *, with_images: bool = True) -> list[LossTerm]:
    """Makes the terms of --loss_terms; their heads get the same initialisation in every process.

    Args:
        config: The run's config.
        model: The model, not yet wrapped.
        with_images: False leaves out terms that look at images, because they may download a network.

    Raises:
        ValueError: A term is unknown or does not fit the model.
    """
    settings = read_json(config.loss_terms)
    if unknown := sorted(set(settings) - set(LOSS_TERMS)):
        raise ValueError(f"Expected terms among {list(LOSS_TERMS)} in --loss_terms, got {unknown}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, "heads"))
        wanted = {LOSS_TERMS[name]: values for name, values in settings.items()}
        return [
            term.for_model(model, **values) for term, values in wanted.items() if with_images or not term.wants_images
        ]


def make_model(config: TrainConfig, source: TrainingSource) -> torch.nn.Module:
    """Makes the model, with the same initialisation in every process.

    Raises:
        ValueError: The model config is of another class, has unknown settings or contradicts the data or the flags.
    """
    # Settings from data and flags.
    given = {"in_channels": source.channels, "sample_size": source.latent_size, "objective": config.objective}
    given["num_classes"] = 0 if config.num_classes == 0 else source.num_classes
    if config.routes is not None:
        routes = {"default": "default", "none": None}
        given["routes"] = routes[config.routes] if config.routes in routes else json.loads(config.routes)

    # Settings from the preset or the model config.
    torch.manual_seed(derive_seed(config.seed, "init"))
    if config.preset is not None:
        name, values = config.preset, read_json(config.preset_config or "{}")
    else:
        values = read_json(config.model_config_name_or_path)
        name = values.get("_class_name", TREADTransformer2DModel.__name__)
        if name not in DENOISERS:
            raise ValueError(f"Expected a model config of one of {list(DENOISERS)}, got {name!r}.")
        values = {key: value for key, value in values.items() if key[0] != "_"}

    # Check that they agree.
    if unknown := sorted(set(values) - set(inspect.signature(denoiser_class(name).__init__).parameters)):
        raise ValueError(f"Expected settings of {name} in the model config, got {unknown}.")
    for key in set(values) & set(given) - {"routes"}:
        if values[key] not in (None, given[key]):
            raise ValueError(f"Expected {key}={given[key]!r} for these data and flags, got {values[key]!r}.")
    return make_denoiser(name, **{**values, **given})


def make_lr_scheduler(
    config: RunConfig, optimizer: torch.optim.Optimizer, settings: Groups, *, step: int, max_steps: int
) -> LRScheduler:
    """Makes the learning-rate schedule of a new or resumed run: a function of the step, which needs no saved state.

    Args:
        config: The run's config.
        optimizer: The optimiser, with the state from the checkpoint.
        settings: Settings of its parameter groups before the checkpoint was loaded.
        step: Optimiser steps done.
        max_steps: Optimiser steps of the whole run.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):  # the checkpoint's may be of another config
        group.update(own, initial_lr=own["lr"])
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_steps,
        last_epoch=step - 1,
    )


def open_feature_extractor(config: RunConfig, accelerator: Accelerator) -> FeatureExtractor | None:
    """Loads the network whose features are compared for the FID; None without --eval_steps."""
    if config.eval_steps is None:
        return None
    require("eval", "matplotlib")  # for the curve
    with accelerator.main_process_first():  # one process downloads
        return load_feature_extractor(
            config.eval_feature_extractor, weights=config.eval_feature_extractor_weights, device=accelerator.device
        )


def describe_run(
    config: TrainConfig, accelerator: Accelerator, source: TrainingSource, model: torch.nn.Module
) -> dict[str, Any]:
    """Collects everything that the run depends on (JSON), to be printed and to tell this run from others.

    Args:
        config: The run's config.
        accelerator: The run's accelerator.
        source: The run's data.
        model: The model, on the meta device.

    Raises:
        ValueError: The loss terms, the optimiser or the sizes of images do not fit the model, the terms need images
            that the data do not have, or the length of the run is not known.
    """
    # Check that loss terms, optimiser and data fit the model.
    with accelerator.main_process_first():  # one process downloads the networks of loss terms
        # Do not download them if the images are not here either. Missing images raise an error in any case.
        is_unseen = isinstance(source, UnseenSource) and source.has_images
        terms = make_terms(config, model, with_images=not is_unseen)
        heads = describe_heads(terms, source)
    make_optimizer(config, model)  # raises for a model that it does not fit
    step = source.resolution // source.latent_size * model.config.get("patch_size", 1)
    if wrong := [size for size in source.sizes if any(side % step for side in size)]:
        raise ValueError(f"Expected buckets with sides that are multiples of {step} for this model, got {wrong}.")

    # Settings.
    settings = common_settings(config, accelerator, source) | {
        "num_classes": model.config.num_classes,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "block_flops_saved": block_flops_saved(model),
        "model_class": type(model).__name__,
        "model": {key: value for key, value in json.loads(model.to_json_string()).items() if key[0] != "_"},
    }
    return settings | ({"heads": heads} if heads else {})


def describe_heads(terms: Sequence[LossTerm], source: TrainingSource) -> dict[str, list[list[int]]]:
    """The shapes of the loss terms' heads, which are trained beside the model, by block (JSON).

    Raises:
        ValueError: A term needs images, but the data have neither images nor stored features for it.
    """
    stored = getattr(getattr(source, "info", None), "patch_features", None)
    for term in terms if not source.has_images else ():
        if term.wants_images and (stored is None or term.stored_features is None):
            raise ValueError(
                "Expected data with images for the loss terms, which look at them, got stored latents. Train on "
                "folder: or hub:, with --pretrained_vae_name_or_path for latents, make latents with "
                "--pretrained_vision_encoder, or leave the term out."
            )
        if term.wants_images:
            stored.check_wanted(term.stored_features)
    heads = [(str(block), head) for term in terms for block, head in term.heads.items()]
    return {block: [list(parameter.shape) for parameter in head.parameters()] for block, head in heads}


def common_settings(config: RunConfig, accelerator: Accelerator, source: TrainingSource) -> dict[str, Any]:
    """The settings that all kinds of runs depend on, without the model (JSON).

    Raises:
        ValueError: The length of the run is not known.
    """
    # Length.
    total_batch_size = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    try:
        num_images = None if config.streaming else len(source)
    except TypeError:
        num_images = None
    if config.max_train_steps is None and num_images is None:
        raise ValueError("Expected --max_train_steps for data whose length is not known, got none.")

    # Settings of the config and of the data.
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in CONTROL_FIELDS}
    if (fields := objective_fields(config, source)) != read_json(config.objective_config):
        settings["objective_config"] = json.dumps(fields)
    if "latents" in (identity := source.identity()):
        settings["data"] = "latents"  # the same run, even if their folder has moved
    epochs = None if num_images is None else config.num_train_epochs * num_images
    return (
        settings
        | identity
        | {
            "max_train_steps": config.max_train_steps or math.ceil(epochs / total_batch_size),
            "mixed_precision": accelerator.mixed_precision,
            "distributed_type": accelerator.distributed_type.value,
            "num_processes": accelerator.num_processes,
            "total_batch_size": total_batch_size,
            "num_images": num_images,
            "steps_per_epoch": None if num_images is None else num_images / total_batch_size,
        }
    )


def describe_classes(config: TrainConfig, settings: dict[str, Any]) -> dict[str, list[Any]]:
    """The rows of `settings_table` that are specific to class-conditional runs."""
    model, side = settings["model"], settings["model"]["sample_size"]
    return {
        "sees": [f"{model['in_channels']}x{side}x{side}", f"{settings['num_classes']} classes"],
        "model": [settings["model_class"], config.preset],
        "routes": describe_routes([TokenRoute(**route) for route in model.get("routes") or []]),
        "objective": [
            config.objective,
            *(text for text in (settings["objective_config"], config.loss_terms) if text != "{}"),
        ],
    }


def describe_routes(routes: Sequence[TokenRoute]) -> list[str]:
    """Describes routes in words, one text for each route."""
    texts = [f"{one.selection_ratio:.0%} of the {one.unit}s skip blocks {one.start} to {one.end}" for one in routes]
    fused = [", fused after them" if one.rejoin == "fuse" else "" for one in routes]
    drops = [f", {one.path_drop:.0%} of the samples all of them" if one.path_drop else "" for one in routes]
    return ["".join(parts) for parts in zip(texts, fused, drops, strict=True)]


def settings_table(
    config: RunConfig, accelerator: Accelerator, settings: dict[str, Any], about: dict[str, list[Any]]
) -> str:
    """A summary of a run in a dozen lines; all settings are in its folder as JSON.

    Args:
        config: The run's config.
        accelerator: The run's accelerator.
        settings: The run's settings.
        about: The rows `sees`, `model`, `routes` and `objective`, which depend on the kind of run.
    """
    epoch, saved = settings["steps_per_epoch"], settings["block_flops_saved"]
    copies = 5 if settings["use_ema"] else 4  # weights, gradients, two moments of AdamW (one of Muon), average
    rows = {
        "data": [config.data, f"{settings['num_images'] or 'unknown number of'} images"],
        "sees": about["sees"],
        "model": [*about["model"], f"{settings['num_parameters'] / 1e6:.1f}M parameters"],
        "routes": [*(about["routes"] or ["none"]), saved is not None and f"{saved:.0%} of the blocks' FLOPs saved"],
        "dense": [f"the last {config.dense_fraction:.0%} of the steps"],
        "objective": about["objective"],
        "steps": [
            f"{settings['max_train_steps']} of {settings['total_batch_size']} images",
            epoch and f"{settings['max_train_steps'] / epoch:.3g} epochs",
        ],
        "optimiser": [
            {
                "adamw": f"AdamW at {config.learning_rate:g}",
                "muon": f"Muon at {config.muon_learning_rate:g} and AdamW at {config.learning_rate:g}",
            }.get(config.optimizer, f"{config.optimizer} at {config.learning_rate:g}"),
            f"{config.lr_scheduler} after {config.lr_warmup_steps} steps",
            config.max_grad_norm and f"clipped at {config.max_grad_norm:g}",
        ],
        "average": [f"decay {config.ema_decay:g}" if config.use_ema else "none"],
        "hardware": [
            f"{settings['num_processes']} x {accelerator.device.type}",
            settings["num_processes"] > 1 and settings["distributed_type"],
            {"no": "float32"}.get(settings["mixed_precision"], settings["mixed_precision"]),
        ],
        "memory": [
            f"{'' if config.optimizer == 'adamw' else 'about '}"
            f"{copies * settings['num_parameters'] * 4 / 2**30:.2f} GiB of training state in all"
        ],
        "folder": [config.output_dir],
    }
    rows = {name: ", ".join(str(part) for part in parts if part) for name, parts in rows.items()}
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())
