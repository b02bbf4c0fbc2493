# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What train_tread.py makes of its flags before a run starts: data, objective, model and the run's settings."""

import argparse
import hashlib
import inspect
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from diffusers import AutoModel
from train_tread_args import CONTROL_FLAGS

from diffusers_tread.data import LatentCodec, LatentsInfo, check_vae, latent_codec, open_training_data
from diffusers_tread.fingerprint import weights_fingerprint
from diffusers_tread.flops import block_flops_saved
from diffusers_tread.metrics import FeatureExtractor, load_feature_extractor
from diffusers_tread.models import DENOISERS, TREADTransformer2DModel, make_denoiser
from diffusers_tread.objectives import LOSS_TERMS, LossTerm, find_objective
from diffusers_tread.runs.fid_curve import FIDCurve
from diffusers_tread.seeds import derive_seed
from diffusers_tread.training.config import read_json


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    if args.report_to not in ("none", "all") and find_spec(args.report_to) is None:
        raise ValueError(f"Expected an installed tracker for --report_to, got {args.report_to!r}. Install it.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        # A plugin, because the environment of `accelerate launch` overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
        ),
    )
    refused = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    is_fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if accelerator.distributed_type in refused or is_fsdp1:
        raise ValueError(
            f"Expected one process, DDP or FSDP2, got {'FSDP1' if is_fsdp1 else accelerator.distributed_type.value}. "
            "For FSDP set `fsdp_version: 2` in the accelerate config."
        )
    return accelerator


def open_data(args: argparse.Namespace, accelerator: Accelerator):
    with accelerator.main_process_first():  # one process fills the cache of `datasets`
        return open_training_data(
            args.dataset_name,
            train_data_dir=args.train_data_dir,
            latents_dir=args.latents_dir,
            resolution=args.resolution,
            random_flip=args.random_flip,
            seed=args.seed,
            image_column=args.image_column,
            label_column=args.label_column,
            background=args.background,
            streaming=args.streaming,
            shuffle_buffer=args.shuffle_buffer,
            dataset_config_name=args.dataset_config_name,
            split=args.dataset_split,
            num_classes=args.num_classes or None,
            cache_dir=args.cache_dir,
        )


def load_vae(args: argparse.Namespace, dataset) -> tuple[Any, int, int]:
    """The VAE, None for pixels, and the channels and the side of what the model sees."""
    name, options, info = args.pretrained_vae_name_or_path, {}, getattr(dataset, "info", None)
    if info is not None and name is None:
        name = info.vae["name_or_path"]
        options = {key: info.vae[key] for key in ("subfolder", "revision") if info.vae.get(key) is not None}
    if name is None:
        return None, dataset.channels, dataset.resolution
    try:
        vae = AutoModel.from_pretrained(name, **options, use_safetensors=True).requires_grad_(False).eval()
    except OSError as error:
        raise ValueError(
            f"Expected a VAE at {name!r}, to decode samples with, got none ({error}). Download it, or say with "
            "--pretrained_vae_name_or_path where it lies."
        ) from error
    if info is None:
        _, channels, size = check_vae(vae, args.resolution)
        return vae, channels, size
    if weights_fingerprint(vae) != info.vae["fingerprint"]:
        raise ValueError(
            f"Expected the VAE that made the latents of {args.latents_dir} ({info.vae['name_or_path']}), got one with "
            f"other weights from {name}. Name the right one with --pretrained_vae_name_or_path."
        )
    # Latents that were normalised elsewhere need no codec to train on; any other one must be the VAE's.
    if info.codec not in (LatentCodec(), latent_codec(vae)):
        raise ValueError(
            f"Expected a VAE that normalises as the latents of {args.latents_dir} say ({info.codec}), got "
            f"{latent_codec(vae)} in the config of {name}. Name the right one with --pretrained_vae_name_or_path."
        )
    return vae, info.latent_channels, info.latent_size


def make_objective(args: argparse.Namespace):
    fields, kind = read_json(args.objective_config), find_objective(args.objective)
    if unknown := sorted(set(fields) - set(inspect.signature(kind).parameters)):
        raise ValueError(f"Expected fields of {kind.__name__} in --objective_config, got {unknown}.")
    return kind(**fields)


def make_terms(args: argparse.Namespace, model: torch.nn.Module) -> list[LossTerm]:
    """The terms of --loss_terms for a model, which is not wrapped."""
    settings = read_json(args.loss_terms)
    if unknown := sorted(set(settings) - set(LOSS_TERMS)):
        raise ValueError(f"Expected terms among {list(LOSS_TERMS)} in --loss_terms, got {unknown}.")
    return [LOSS_TERMS[name].for_model(model, **values) for name, values in settings.items()]


def num_model_classes(args: argparse.Namespace, dataset) -> int:
    """Classes of the model, which does not look at labels with --num_classes 0."""
    return 0 if args.num_classes == 0 else dataset.num_classes


def make_model(args: argparse.Namespace, *, channels: int, sample_size: int, num_classes: int):
    """The model at its initialisation, the same in every process."""
    given = {"in_channels": channels, "sample_size": sample_size, "num_classes": num_classes}
    given["objective"] = args.objective
    if args.routes is not None:
        routes = {"default": "default", "none": None}
        given["routes"] = routes[args.routes] if args.routes in routes else json.loads(args.routes)
    torch.manual_seed(derive_seed(args.seed, "init"))
    if args.preset is not None:
        return make_denoiser(args.preset, **given)

    config = read_json(args.model_config_name_or_path)
    name = config.get("_class_name", TREADTransformer2DModel.__name__)
    if name not in DENOISERS:
        raise ValueError(f"Expected a model config of one of {list(DENOISERS)}, got {name!r}.")
    config = {key: value for key, value in config.items() if key[0] != "_"}
    if unknown := sorted(set(config) - set(inspect.signature(DENOISERS[name].__init__).parameters)):
        raise ValueError(f"Expected settings of {name} in the model config, got {unknown}.")
    for key in set(config) & set(given) - {"routes"}:
        if config[key] not in (None, given[key]):
            raise ValueError(f"Expected {key}={given[key]!r} for these data and flags, got {config[key]!r}.")
    return make_denoiser(name, **{**config, **given})


def open_feature_extractor(args: argparse.Namespace, accelerator: Accelerator) -> FeatureExtractor | None:
    """The network that samples are compared with; None without --eval_steps."""
    if args.eval_steps is None:
        return None
    if find_spec("matplotlib") is None:
        raise ValueError(
            'Expected matplotlib, which draws the FID, got none. Install "diffusers-tread[fid]" or drop --eval_steps.'
        )
    with accelerator.main_process_first():  # one process downloads
        return load_feature_extractor(
            args.eval_feature_extractor, weights=args.eval_feature_extractor_weights, device=accelerator.device
        )


def open_fid_curve(
    args: argparse.Namespace, accelerator: Accelerator, *, extractor: FeatureExtractor, image_size: int, step: int
) -> FIDCurve:
    return FIDCurve(
        accelerator,
        args.output_dir,
        step=step,
        extractor=extractor,
        reference=args.eval_reference,
        image_size=image_size,
        num_samples=args.eval_num_samples,
        batch_size=args.eval_batch_size,
        num_inference_steps=args.eval_inference_steps,
        guidance_scale=args.eval_guidance_scale,
        seed=args.seed,
    )


def name_data(args: argparse.Namespace, info: LatentsInfo | None) -> str | None:
    """The images' repository, for a model card; None for a folder of this machine."""
    name = args.dataset_name if info is None else info.source.get("dataset_name")
    if name is None and info is None and args.train_data_dir is None:
        return "scikit-learn's digits"
    return None if name is None or Path(name).exists() else name


def latents_digest(info: LatentsInfo) -> str:
    """Tells latents apart by their shards and by how they are read, wherever they lie."""
    codec = [info.shift_factor, info.scaling_factor, info.latents_mean, info.latents_std]
    content = [info.kind, *codec, [shard["sha256"] for shard in info.shards]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def resolve_settings(args, accelerator, *, dataset, model: torch.nn.Module) -> dict[str, Any]:
    """All that the run depends on, for the eye and for telling this run from others."""
    make_terms(args, model)  # raises for a model that they do not fit
    total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    num_images, info = None if args.streaming else len(dataset), getattr(dataset, "info", None)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_images / total_batch_size)
    config = {key: value for key, value in json.loads(model.to_json_string()).items() if key[0] != "_"}
    return {key: value for key, value in vars(args).items() if key not in CONTROL_FLAGS} | {
        "mixed_precision": accelerator.mixed_precision,
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "total_batch_size": total_batch_size,
        "num_images": num_images,
        "latents": None if info is None else latents_digest(info),
        "num_classes": num_model_classes(args, dataset),
        "steps_per_epoch": None if num_images is None else num_images / total_batch_size,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "block_flops_saved": block_flops_saved(model),
        "model_class": type(model).__name__,
        "model": config,
    }


def print_settings(settings: dict[str, Any]) -> None:
    print(json.dumps(settings, indent=2))
    copies = 5 if settings["use_ema"] else 4  # weights, gradients, two Adam moments, average
    gibibytes = copies * settings["num_parameters"] * 4 / 2**30
    print(
        f"{settings['num_parameters'] / 1e6:.1f}M parameters, {gibibytes:.2f} GiB of training state in all; "
        f"{settings['max_train_steps']} steps of {settings['total_batch_size']} images; routes "
        f"{settings['model']['routes']}, which save {settings['block_flops_saved']:.0%} of the blocks' FLOPs"
    )
