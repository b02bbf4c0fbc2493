# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The flags of train_tread.py and their checks."""

import argparse
import sys
from functools import partial
from pathlib import Path

from diffusers.optimization import SchedulerType

from diffusers_tread.objectives import OBJECTIVES, FlowMatchingObjective
from diffusers_tread.training.config import config_flags


DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.json"
# Flags that say where and how to run, not what: no part of the run's settings.
CONTROL_FLAGS = (
    *("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_push_steps"),
)
# Settings that leave the weights alone: they may change between the parts of one run.
FREE_SETTINGS = (
    *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to", "tracker_project_name"),
    *("validation_steps", "num_validation_images", "validation_inference_steps", "validation_guidance_scale"),
    *("eval_steps", "eval_reference", "eval_feature_extractor", "eval_feature_extractor_weights"),
    *("eval_num_samples", "eval_batch_size", "eval_inference_steps", "eval_guidance_scale"),
    *("dataloader_num_workers", "cache_dir", "max_corrupt_images", "latents_dir"),
)


def parse_args(argv: list[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """Flags, over the values of `--config`, over the defaults. Without any data flag the digits recipe applies."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
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
    add("--dataset_name", help="A `datasets` repository; without any data: scikit-learn's digits.")
    add("--dataset_config_name", help="Its configuration.")
    add(
        "--dataset_split",
        help="The split to train on, of --train_data_dir the sub-folder; by default train, or the folder itself.",
    )
    add("--train_data_dir", help="A folder with one folder of images per class.")
    add("--background", default="white", help="Colour behind transparent images, such as white or #808080.")
    add("--latents_dir", help="Latents: a folder of precompute_latents.py, or its repository on the Hub.")
    add("--image_column", default="image", help="Column with images.")
    add("--label_column", default="label", help="Column with class labels.")
    add("--num_classes", type=int, help="By default as many as the data have; 0 trains without classes.")
    add("--cache_dir", help="Where downloaded data are kept.")
    flag("--streaming", help="Read the repository without downloading it first.")
    add("--shuffle_buffer", type=int, default=10_000, help="Records that the shuffle of a stream holds in memory.")
    add("--resolution", type=int, help="Side of the training images in pixels.")
    flag("--random_flip", help="Flip images horizontally at random.")
    add("--max_corrupt_images", type=int, default=100, help="Unreadable images per process to replace, then an error.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes (threads when streaming) that decode.")
    add(
        "--pretrained_vae_name_or_path",
        help="Train on the latents of this VAE, encoded on the fly. With --latents_dir: where the VAE that made them "
        "lies now; by default where it lay then.",
    )

    # Model.
    add("--preset", help="Size of the model, S/2 to XL/8.")
    add("--model_config_name_or_path", help="Instead of a preset: a model folder, a JSON file or the JSON itself.")
    add("--routes", help="'default', 'none' or a JSON list with the fields of TokenRoute: start, end, ...")
    add("--dense_fraction", type=float, default=0.15, help="Last share of the steps, trained without routing.")

    # Objective and optimisation.
    add("--objective", choices=list(OBJECTIVES), default=FlowMatchingObjective.name, help="What is predicted.")
    add("--objective_config", default="{}", help='Fields of the objective as JSON, such as {"shift": 3.0}.')
    add("--loss_terms", default="{}", help='Further terms as JSON, such as {"reconstruction": {"weight": 0.1}}.')
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
    add(
        "--matmul_precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="Of float32 matrix products, see torch.set_float32_matmul_precision; high is TF32 on NVIDIA GPUs.",
    )

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

    # Metrics while training.
    add("--eval_steps", type=int, help="Steps between measurements of the FID; by default none.")
    add(
        "--eval_reference",
        help="What samples are compared with: statistics or images in an .npz, or a folder of images.",
    )
    add("--eval_feature_extractor", default="inception", help="Network whose features are compared.")
    add("--eval_feature_extractor_weights", help="File with its weights; by default downloaded.")
    add("--eval_num_samples", type=int, default=10_000, help="Samples of a measurement, of all processes together.")
    add("--eval_batch_size", type=int, default=32, help="Samples per process and forward.")
    add("--eval_inference_steps", type=int, default=20, help="Sampling steps.")
    add("--eval_guidance_scale", type=float, default=1.0, help="Classifier-free guidance; 1 for none.")

    # The Hub.
    flag("--push_to_hub", help="Push the finished pipeline, with a model card.")
    add("--hub_model_id", help='Repository to push to, "organisation/name".')
    add(
        "--hub_private",
        action=argparse.BooleanOptionalAction,
        help="Whether a new repository is private; by default as its owner has set.",
    )
    add("--hub_push_steps", type=int, help="Steps between pushes while training goes on; by default none.")

    # The config becomes flags in front of the command line: both are read by the same rules.
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.config is None and not (args.dataset_name or args.train_data_dir or args.latents_dir):
        args.config = str(DIGITS_CONFIG)
    known = set(vars(args)) - {"config"}
    flags = [] if args.config is None else config_flags(args.config, known=known)
    return check_args(parser.parse_args(flags + argv))


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    positive = "train_batch_size gradient_accumulation_steps max_train_steps num_train_epochs checkpointing_steps " \
        "checkpoints_total_limit logging_steps validation_steps num_validation_images shuffle_buffer resolution " \
        "validation_inference_steps learning_rate eval_steps eval_num_samples eval_batch_size " \
        "eval_inference_steps hub_push_steps".split()  # fmt: skip
    for name in positive:
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"Expected --{name} > 0, got {value}.")
    for name in ("dense_fraction", "class_dropout_prob", "ema_decay"):
        if not 0.0 <= (value := getattr(args, name)) <= 1.0:
            raise ValueError(f"Expected --{name} in [0, 1], got {value}.")
    for name in ("num_classes", "lr_warmup_steps", "max_grad_norm", "dataloader_num_workers", "max_corrupt_images"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise ValueError(f"Expected --{name} >= 0, got {value}.")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise ValueError("Expected one of --overwrite_output_dir and --resume_from_checkpoint, got both.")

    if args.eval_steps is not None and (args.eval_reference is None or not Path(args.eval_reference).exists()):
        raise ValueError(
            f"Expected --eval_reference, an .npz or a folder of images, for --eval_steps, got {args.eval_reference!r}."
        )
    if args.push_to_hub and "/" not in (args.hub_model_id or ""):
        raise ValueError(f'Expected --hub_model_id "organisation/name" with --push_to_hub, got {args.hub_model_id!r}.')
    if args.hub_push_steps is not None and not args.push_to_hub:
        raise ValueError("Expected --push_to_hub with --hub_push_steps, got the latter alone.")
    if args.streaming and args.max_train_steps is None:
        raise ValueError("Expected --max_train_steps with --streaming, whose length is not known.")
    if (args.preset is None) == (args.model_config_name_or_path is None):
        raise ValueError("Expected either --preset or --model_config_name_or_path for the size of the model.")
    return args
