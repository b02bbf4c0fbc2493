# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a class-conditional diffusion transformer with token routing (TREAD, arXiv 2501.04765).

    python examples/train_tread.py                                                # the digits recipe, no download
    accelerate launch examples/train_tread.py --config examples/configs/imagenet256_xl2.json --output_dir runs/xl2

The same command goes on with a run that was killed. See docs/training.md.
"""

import argparse
import inspect
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, gather_object
from diffusers import AutoModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from diffusers_tread import (
    EDMObjective,
    FlowMatchingObjective,
    TREADPipeline,
    TREADTransformer2DModel,
    get_token_router,
)
from diffusers_tread.data import derive_seed, encode_images, make_batches, open_training_data
from diffusers_tread.flops import block_flops_saved
from diffusers_tread.training.checkpoints import load_checkpoint, replace_folder, save_checkpoint
from diffusers_tread.training.config import config_flags, read_json
from diffusers_tread.training.ema import averaged_weights
from diffusers_tread.training.run_folder import open_run_folder


DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.json"
OBJECTIVES = {"edm": EDMObjective, "flow": FlowMatchingObjective}
# Flags that say where and how to run, not what: no part of the run's settings.
CONTROL_FLAGS = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run")
# Settings that leave the weights alone: they may change between the parts of one run.
FREE_SETTINGS = (
    *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to", "tracker_project_name"),
    *("validation_steps", "num_validation_images", "validation_inference_steps", "validation_guidance_scale"),
    *("dataloader_num_workers", "cache_dir", "max_corrupt_images"),
)

logger = get_logger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, over the values of `--config`, over the defaults. Without any data flag the digits recipe applies."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    flag = partial(add, action=argparse.BooleanOptionalAction, default=False)

    add("--config", help="JSON file with values for any of these flags; the command line wins.")
    add("--output_dir", default="tread-model", help="Checkpoints, samples, logs and, at the end, `pipeline`.")
    flag("--overwrite_output_dir", help="Delete what an earlier run left in the output folder.")
    add(
        "--resume_from_checkpoint",
        help="'latest' or a checkpoint, to go on with changed settings. Without it a folder that holds this very run "
        "is resumed.",
    )
    add("--seed", type=int, default=0, help="Everything random follows from it.")
    flag("--dry_run", help="Print the config, the model's size and the length of the run; write nothing.")

    # Data.
    add("--dataset_name", help="A `datasets` repository; without it and --train_data_dir: scikit-learn's digits.")
    add("--dataset_config_name", help="Its configuration.")
    add("--dataset_split", help="The split to train on; by default train.")
    add("--train_data_dir", help="A folder with one sub-folder of images per class.")
    add("--image_column", default="image", help="Column with images.")
    add("--label_column", default="label", help="Column with class labels.")
    add("--num_classes", type=int, help="Number of classes; by default as many as the data have.")
    add("--cache_dir", help="Cache of `datasets`.")
    flag("--streaming", help="Read the repository without downloading it first.")
    add("--shuffle_buffer", type=int, default=10_000, help="Records that the shuffle of a stream holds in memory.")
    add("--resolution", type=int, help="Side of the training images in pixels.")
    flag("--random_flip", help="Flip images horizontally at random.")
    add("--max_corrupt_images", type=int, default=100, help="Unreadable images per process to replace, then an error.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes (threads when streaming) that decode.")
    add("--pretrained_vae_name_or_path", help="Train on the latents of this VAE, encoded on the fly.")

    # Model.
    add("--preset", help="Size of the model, S/2 to XL/8.")
    add("--model_config_name_or_path", help="Instead of a preset: a model folder, a JSON file or the JSON itself.")
    add("--routes", help="'default', 'none' or a JSON list of {start, end, selection_ratio}.")
    add("--dense_fraction", type=float, default=0.15, help="Last share of the steps, trained without routing.")

    # Objective and optimisation.
    add("--objective", choices=sorted(OBJECTIVES), default="flow", help="EDM or flow matching.")
    add("--objective_config", default="{}", help='Fields of the objective as JSON, such as {"shift": 3.0}.')
    add("--class_dropout_prob", type=float, default=0.1, help="Share of labels replaced by the null class.")
    add("--train_batch_size", type=int, default=16, help="Images per process and forward.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Forwards per optimiser step.")
    add("--num_train_epochs", type=int, default=100, help="Length of the run without --max_train_steps.")
    add("--max_train_steps", type=int, help="Optimiser steps of the run.")
    add("--learning_rate", type=float, default=1e-4, help="After the warm-up; not scaled by the batch.")
    schedules = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedules, default="constant_with_warmup", help="As in diffusers.optimization.")
    add("--lr_warmup_steps", type=int, default=0, help="Optimiser steps.")
    add("--adam_beta1", type=float, default=0.9, help="AdamW.")
    add("--adam_beta2", type=float, default=0.999, help="AdamW.")
    add("--adam_weight_decay", type=float, default=0.0, help="AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW.")
    add("--max_grad_norm", type=float, default=1.0, help="0 for no clipping.")
    flag("--use_ema", help="Average the weights; validate with the average and save it.")
    add("--ema_decay", type=float, default=0.9999, help="Decay per optimiser step, reached after a warm-up.")

    # Hardware.
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default as `accelerate config` says.")
    flag("--gradient_checkpointing", help="Recompute the blocks in the backward pass to save memory.")
    flag("--compile", help="Compile the blocks with torch.compile.")
    flag("--allow_tf32", help="TF32 matrix products on NVIDIA GPUs.")

    # Checkpoints, logs, samples.
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints; one more ends the run.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints to keep; by default all.")
    add("--logging_steps", type=int, default=10, help="Steps between logs and checks for a loss that is not finite.")
    add("--report_to", default="none", help="tensorboard, wandb, trackio, all or none.")
    add("--tracker_project_name", default="train_tread", help="Name of the run's project in the tracker.")
    add("--validation_steps", type=int, help="Steps between sample grids; by default none.")
    add(
        "--num_validation_images",
        type=int,
        default=20,
        help="Samples in a grid, of one class after the other.",
    )
    add("--validation_inference_steps", type=int, default=20, help="Sampling steps.")
    add("--validation_guidance_scale", type=float, default=1.0, help="Classifier-free guidance; 1 for none.")

    # The config becomes flags in front of the command line: both are read by the same rules.
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.config is None and args.dataset_name is None and args.train_data_dir is None:
        args.config = str(DIGITS_CONFIG)
    known = set(vars(args)) - {"config"}
    flags = [] if args.config is None else config_flags(args.config, known=known)
    return check_args(parser.parse_args(flags + argv))


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    positive = "train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs checkpointing_steps " \
        "checkpoints_total_limit logging_steps validation_steps num_validation_images shuffle_buffer resolution " \
        "num_classes validation_inference_steps learning_rate".split()  # fmt: skip
    for name in positive:
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"Expected --{name} > 0, got {value}.")
    for name in ("dense_fraction", "class_dropout_prob", "ema_decay"):
        if not 0.0 <= (value := getattr(args, name)) <= 1.0:
            raise ValueError(f"Expected --{name} in [0, 1], got {value}.")
    for name in ("lr_warmup_steps", "max_grad_norm", "dataloader_num_workers", "max_corrupt_images"):
        if (value := getattr(args, name)) < 0:
            raise ValueError(f"Expected --{name} >= 0, got {value}.")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise ValueError("Expected one of --overwrite_output_dir and --resume_from_checkpoint, got both.")

    if args.streaming and args.max_train_steps is None:
        raise ValueError("Expected --max_train_steps with --streaming, whose length is not known.")
    if (args.preset is None) == (args.model_config_name_or_path is None):
        raise ValueError("Expected either --preset or --model_config_name_or_path for the size of the model.")
    return args


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
            resolution=args.resolution,
            random_flip=args.random_flip,
            seed=args.seed,
            image_column=args.image_column,
            label_column=args.label_column,
            streaming=args.streaming,
            shuffle_buffer=args.shuffle_buffer,
            dataset_config_name=args.dataset_config_name,
            split=args.dataset_split,
            num_classes=args.num_classes,
            cache_dir=args.cache_dir,
        )


def make_objective(args: argparse.Namespace):
    fields, kind = read_json(args.objective_config), OBJECTIVES[args.objective]
    if unknown := sorted(set(fields) - set(inspect.signature(kind).parameters)):
        raise ValueError(f"Expected fields of {kind.__name__} in --objective_config, got {unknown}.")
    return kind(**fields)


def make_model(args: argparse.Namespace, *, channels: int, sample_size: int, num_classes: int):
    """The model at its initialisation, the same in every process."""
    given = {"in_channels": channels, "sample_size": sample_size, "num_classes": num_classes}
    given["objective"] = args.objective
    if args.routes is not None:
        routes = {"default": "default", "none": None}
        given["routes"] = routes[args.routes] if args.routes in routes else json.loads(args.routes)
    torch.manual_seed(derive_seed(args.seed, "init"))
    if args.preset is not None:
        return TREADTransformer2DModel.from_preset(args.preset, **given)

    config = {key: value for key, value in read_json(args.model_config_name_or_path).items() if key[0] != "_"}
    if unknown := sorted(set(config) - set(inspect.signature(TREADTransformer2DModel.__init__).parameters)):
        raise ValueError(f"Expected settings of TREADTransformer2DModel in the model config, got {unknown}.")
    for key in set(config) & set(given) - {"routes"}:
        if config[key] not in (None, given[key]):
            raise ValueError(f"Expected {key}={given[key]!r} for these data and flags, got {config[key]!r}.")
    return TREADTransformer2DModel(**{**config, **given})


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP2 shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Trainer:
    """Everything that lives through a run; `train` runs it."""

    def __init__(self, args, accelerator, *, objective, dataset, vae, model, settings, checkpoint):
        self.args, self.accelerator, self.objective, self.vae = args, accelerator, objective, vae
        self.id2label, self.num_classes, self.settings = dataset.id2label, dataset.num_classes, settings

        # Model.
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.compile:
            model.compile_repeated_blocks(dynamic=False)
        self.names = [name for name, _ in model.named_parameters()]
        adam = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "weight_decay": args.adam_weight_decay,
            "eps": args.adam_epsilon,
        }
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **adam)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = list(self.model.parameters())
        self.router = get_token_router(self.model)
        self.ema = EMAModel(self.parameters, decay=args.ema_decay, foreach=True) if args.use_ema else None

        # Resume. The learning rate is a function of the step, so that it needs no state.
        state = {"global_step": 0, "samples_seen": 0}
        if checkpoint is not None:
            self.settle_buckets()
            state = load_checkpoint(accelerator, checkpoint, ema=self.ema, ema_names=self.names)
            accelerator.print(f"Resuming from {checkpoint}.")
        self.step, self.samples_seen = state["global_step"], state["samples_seen"]
        for group in self.optimizer.param_groups:
            group.update(adam, initial_lr=args.learning_rate)
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            last_epoch=self.step - 1,
        )
        self.batches = make_batches(
            dataset,
            batch_size=args.train_batch_size,
            seed=args.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            samples_seen=self.samples_seen,
            stream_positions=state.get("stream_positions"),
        )
        self.position, self.corrupt = None, set(state.get("corrupt_images", []))
        self.generator = torch.Generator(accelerator.device)
        self.loss_sum, self.logged_step, self.logged_time = torch.zeros((), device=accelerator.device), self.step, 0.0

    def settle_buckets(self) -> None:
        """Lets DDP regroup its gradients, as it does after a first backward, before a checkpoint is loaded.

        Sums over more than two processes depend on the groups: without this a resumed run rounds its first step
        differently.
        """
        if isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            config, device = self.settings["model"], self.accelerator.device
            latents = torch.zeros(1, config["in_channels"], *[config["sample_size"]] * 2, device=device)
            label = torch.zeros(1, dtype=torch.int64, device=device)
            self.model(latents, torch.zeros(1, device=device), label).sample.sum().backward()
            self.model.zero_grad()

    def train(self) -> None:
        args, accelerator = self.args, self.accelerator
        first_dense_step = round(args.max_train_steps * (1 - args.dense_fraction))
        progress = tqdm(
            total=args.max_train_steps, initial=self.step, desc="Steps", disable=not accelerator.is_main_process
        )
        self.model.train()
        self.logged_time = time.perf_counter()
        while self.step < args.max_train_steps:
            self.router.enabled = None if self.step < first_dense_step else False
            self.loss_sum += self.train_step()
            self.step += 1
            self.samples_seen += self.settings["total_batch_size"]
            progress.update()

            # A checkpoint or a grid is only made of weights that were looked at.
            is_last = self.step == args.max_train_steps
            is_validation = args.validation_steps is not None and (is_last or self.step % args.validation_steps == 0)
            is_checkpoint = is_last or self.step % args.checkpointing_steps == 0
            if is_validation or is_checkpoint or self.step % args.logging_steps == 0:
                self.log(progress)
            if is_validation or is_checkpoint:
                self.check_weights()
            if is_checkpoint:
                self.save_checkpoint()
            if is_validation:
                self.validate()
            if is_validation or is_checkpoint:
                self.logged_time = time.perf_counter()
        progress.close()

    def train_step(self) -> torch.Tensor:
        """One optimiser step; the loss of this process as a tensor, so that nothing waits for the device."""
        accelerator, total = self.accelerator, 0.0
        for micro_step in range(self.args.gradient_accumulation_steps):
            latents, class_labels = self.next_batch(micro_step)
            with accelerator.accumulate(self.model):
                loss = self.objective.loss(self.model, latents, class_labels, self.generator).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach()
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return total / self.args.gradient_accumulation_steps

    def next_batch(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and labels; sets the generator and the routing seed of this forward, functions of where it is."""
        seed = partial(derive_seed, self.args.seed, self.step, micro_step, self.accelerator.process_index)
        batch = next(self.batches)
        self.note_corrupt(batch)

        # Labels: some become the null class.
        draws = torch.rand(len(batch["class_labels"]), generator=torch.Generator().manual_seed(seed("labels")))
        labels = batch["class_labels"].masked_fill(draws < self.args.class_dropout_prob, self.num_classes)
        labels = labels.to(self.accelerator.device, non_blocking=True)

        # Latents.
        self.generator.manual_seed(seed("noise"))
        self.router.seed = seed("routing")
        latents = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        if self.vae is not None:
            latents = encode_images(self.vae, latents, generator=self.generator)
        return latents, labels

    def note_corrupt(self, batch: dict[str, Any]) -> None:
        self.position = batch.get("position")
        if new := sorted(set(batch["corrupt"]) - self.corrupt):
            self.corrupt.update(new)
            logger.warning(f"Replaced unreadable: {', '.join(new)}.", main_process_only=False)
        if len(self.corrupt) > self.args.max_corrupt_images:
            raise ValueError(
                f"Expected at most {self.args.max_corrupt_images} unreadable images, got {len(self.corrupt)}, such as "
                f"{sorted(self.corrupt)[:5]}. Repair the data or raise --max_corrupt_images."
            )

    def log(self, progress: tqdm) -> None:
        """The mean loss since the last log, over all processes; stops the run if it is not finite."""
        steps = self.step - self.logged_step
        if steps == 0:
            return
        loss = self.accelerator.reduce(self.loss_sum / steps, reduction="mean").item()
        if not math.isfinite(loss):
            raise ValueError(
                f"Expected a finite loss, got {loss} between steps {self.logged_step} and {self.step}. The last "
                "checkpoint is kept; go on from it with a lower --learning_rate and --resume_from_checkpoint latest."
            )
        now = time.perf_counter()
        values = {
            "loss": loss,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "images_per_second": steps * self.settings["total_batch_size"] / (now - self.logged_time),
            "block_flops_saved": self.settings["block_flops_saved"] if self.router.enabled is None else 0.0,
        }
        progress.set_postfix(
            loss=f"{loss:.4f}",
            img_s=f"{values['images_per_second']:.1f}",
            flops_saved=f"{values['block_flops_saved']:.0%}",
            **({"corrupt": len(self.corrupt)} if self.corrupt else {}),
        )
        self.accelerator.log(values, step=self.step)
        self.loss_sum.zero_()
        self.logged_step, self.logged_time = self.step, now

    def check_weights(self) -> None:
        """A finite loss says nothing about the weights that the last step left."""
        finite = torch.stack([local(parameter.detach()).isfinite().all() for parameter in self.parameters]).all()
        if self.accelerator.reduce((~finite).float(), reduction="sum").item() > 0:
            raise ValueError(
                f"Expected finite weights, got others after step {self.step}. The last checkpoint is kept; go on from "
                "it with a lower --learning_rate and --resume_from_checkpoint latest."
            )

    def save_checkpoint(self) -> None:
        state = {
            "global_step": self.step,
            "samples_seen": self.samples_seen,
            "corrupt_images": sorted(set(gather_object(sorted(self.corrupt)))),
            "settings": self.settings,
        }
        if self.position is not None:
            state["stream_positions"] = gather_object([list(self.position)])
        save_checkpoint(
            self.accelerator,
            self.args.output_dir,
            self.step,
            state=state,
            ema=self.ema,
            ema_names=self.names,
            total_limit=self.args.checkpoints_total_limit,
        )

    def make_pipeline(self, transformer: TREADTransformer2DModel) -> TREADPipeline:
        scheduler = self.objective.scheduler()
        pipeline = TREADPipeline(transformer=transformer, scheduler=scheduler, vae=self.vae, id2label=self.id2label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def validate(self) -> None:
        """A grid of samples, dense, with the averaged weights. With FSDP all processes must run the model."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        if self.accelerator.is_main_process or self.accelerator.is_fsdp2:
            labels = [index % self.num_classes for index in range(args.num_validation_images)]
            seeds = [derive_seed(args.seed, "validation", index) for index in range(args.num_validation_images)]
            model.eval()
            # Eager: a grid's batch is not worth a compilation.
            with averaged_weights(self.ema, self.model), torch.compiler.set_stance("force_eager"):
                images = self.make_pipeline(model)(
                    class_labels=labels,
                    num_inference_steps=args.validation_inference_steps,
                    guidance_scale=args.validation_guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                ).images
            self.model.train()
        if self.accelerator.is_main_process:
            self.save_grid(images)
        self.accelerator.wait_for_everyone()

    def save_grid(self, images: list[PIL.Image.Image]) -> None:
        columns = min(10, len(images))
        zoom = max(1, 64 // images[0].width)
        images = [image.resize((image.width * zoom,) * 2, PIL.Image.Resampling.NEAREST) for image in images]
        images += [PIL.Image.new(images[0].mode, images[0].size)] * (-len(images) % columns)
        grid = make_image_grid(images, rows=len(images) // columns, cols=columns)
        path = Path(self.args.output_dir, "samples", f"step-{self.step:07d}.png")
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):  # not all have it
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(grid.convert("RGB"))[None]}, step=self.step, **options)

    def save_pipeline(self) -> None:
        """`output_dir/pipeline`, whole or not at all, with the averaged weights if there are any."""
        folder = Path(self.args.output_dir, "pipeline.tmp")
        with averaged_weights(self.ema, self.model):
            weights = self.accelerator.get_state_dict(self.model)  # sharded weights are gathered on the main process
            if self.accelerator.is_main_process:
                transformer = TREADTransformer2DModel(**self.settings["model"])
                transformer.load_state_dict(weights)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
                self.make_pipeline(transformer).save_pretrained(folder)
                replace_folder(folder, folder.with_name("pipeline"))
        self.accelerator.wait_for_everyone()


def resolve_settings(args, accelerator, *, dataset, model: TREADTransformer2DModel) -> dict[str, Any]:
    """All that the run depends on, for the eye and for telling this run from others."""
    total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    num_images = None if args.streaming else len(dataset)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_images / total_batch_size)
    config = {key: value for key, value in json.loads(model.to_json_string()).items() if key[0] != "_"}
    return {key: value for key, value in vars(args).items() if key not in CONTROL_FLAGS} | {
        "mixed_precision": accelerator.mixed_precision,
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "total_batch_size": total_batch_size,
        "num_images": num_images,
        "num_classes": dataset.num_classes,
        "steps_per_epoch": None if num_images is None else num_images / total_batch_size,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "block_flops_saved": block_flops_saved(config),
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # Data, objective, model: everything is checked before anything is written.
    dataset, objective = open_data(args, accelerator), make_objective(args)
    vae, channels, sample_size = None, dataset.channels, dataset.resolution
    if args.pretrained_vae_name_or_path is not None:
        vae = AutoModel.from_pretrained(args.pretrained_vae_name_or_path).requires_grad_(False).eval()
        channels, sample_size = encode_images(vae, torch.zeros(1, 3, args.resolution, args.resolution)).shape[1:3]
    build = partial(make_model, args, channels=channels, sample_size=sample_size, num_classes=dataset.num_classes)
    with init_empty_weights():
        settings = resolve_settings(args, accelerator, dataset=dataset, model=build())
    if accelerator.is_main_process:
        print_settings(settings)
    if args.dry_run:
        return accelerator.end_training()

    # Output folder.
    checkpoint = open_run_folder(
        accelerator,
        args.output_dir,
        settings=settings,
        free_settings=FREE_SETTINGS,
        resume_from_checkpoint=args.resume_from_checkpoint,
        overwrite=args.overwrite_output_dir,
        fixed_settings=("model",),
    )
    if args.report_to != "none":
        scalars = {key: value for key, value in settings.items() if isinstance(value, (str, int, float))}
        accelerator.init_trackers(args.tracker_project_name, config=scalars)

    trainer = Trainer(
        args,
        accelerator,
        objective=objective,
        dataset=dataset,
        vae=None if vae is None else vae.to(accelerator.device),
        model=build(),
        settings=settings,
        checkpoint=checkpoint,
    )
    trainer.train()
    trainer.save_pipeline()
    accelerator.print(f"Saved {Path(args.output_dir, 'pipeline')}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
