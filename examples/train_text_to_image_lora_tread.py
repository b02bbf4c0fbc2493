# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Finetunes the transformer of a diffusers text-to-image pipeline with token routing (TREAD, arXiv 2501.04765).

    accelerate launch examples/train_text_to_image_lora_tread.py --pretrained_model_name_or_path \
        stabilityai/stable-diffusion-3.5-medium --train_data_dir photos --output_dir lora --resolution 512

Works with the pipelines of flow-matching models: the prompt goes to the prediction the way the pipeline itself takes,
so whatever the model wants of text, positions or timesteps is right. The same command goes on with a killed run.
"""

import argparse
import inspect
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import cast_training_params, compute_density_for_timestep_sampling
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diffusers_tread import apply_token_routing, token_routing
from diffusers_tread.data import EpochBatchSampler, center_crop, encode_images, image_to_tensor
from diffusers_tread.hub import check_model_index
from diffusers_tread.seeds import derive_seed
from diffusers_tread.training.checkpoints import load_checkpoint, save_checkpoint
from diffusers_tread.training.run_folder import open_run_folder


TRAINED_WEIGHTS = "trained_weights.safetensors"
# Flags that say where and how to run, not what.
CONTROL_FLAGS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
FIXED_SETTINGS = ("pretrained_model_name_or_path", "full", "rank", "lora_target_modules")
FREE_SETTINGS = ("checkpointing_steps", "checkpoints_total_limit", "logging_steps")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="A pipeline's folder or repository.")
    add("--output_dir", default="text-to-image-tread", help="Checkpoints and, at the end, the trained weights.")
    add("--overwrite_output_dir", action="store_true", help="Delete what an earlier run left in the output folder.")
    add("--resume_from_checkpoint", help="'latest' or a checkpoint, to go on with changed settings.")
    add("--dataset_name", help="A `datasets` repository with image and caption columns.")
    add("--train_data_dir", help="Instead: an image folder with captions in metadata.jsonl.")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--resolution", type=int, default=512, help="Side of the training images in pixels.")
    add("--routes", default='[{"start": 2, "end": -4}]', help="JSON; blocks count over all main stacks.")
    add("--dense_fraction", type=float, default=0.15, help="Last share of the steps, trained without routing.")
    add("--full", action="store_true", help="Train all weights of the transformer instead of a LoRA.")
    add("--rank", type=int, default=16, help="Of the LoRA.")
    add("--lora_target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"])
    add("--guidance_scale", type=float, default=1.0, help="For guidance-distilled models. No other guidance is run.")
    add("--train_batch_size", type=int, default=4, help="Images per process and forward.")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=1000, help="Optimiser steps.")
    add("--learning_rate", type=float, default=1e-4)
    add("--max_grad_norm", type=float, default=1.0)
    add("--gradient_checkpointing", action="store_true")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default as `accelerate config` says.")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--logging_steps", type=int, default=10, help="Steps between looks at the loss, which must be finite.")
    add("--seed", type=int, default=0, help="Everything random follows from it.")
    args = parser.parse_args(argv)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("expected one of --dataset_name and --train_data_dir")
    if not 0.0 <= args.dense_fraction <= 1.0:
        parser.error(f"expected --dense_fraction in [0, 1], got {args.dense_fraction}")
    return args


class _VelocityPredicted(Exception):
    """Carries the prediction out of the pipeline's denoising loop."""


class _OneStepScheduler(FlowMatchEulerDiscreteScheduler):
    """Makes a pipeline predict once, at the given noise levels, one per sample."""

    sigmas_of_batch: torch.Tensor

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.timesteps = (self.sigmas_of_batch * self.config.num_train_timesteps).unsqueeze(0)  # 1 B
        self.sigmas = self.sigmas_of_batch.unsqueeze(0)
        self.num_inference_steps = 1

    def step(self, model_output, timestep, sample, **kwargs):
        raise _VelocityPredicted(model_output)


class PipelineVelocity(torch.nn.Module):
    """From prompts and noisy latents to the velocity, through the pipeline's own `__call__`, with gradients.

    Args:
        pipeline: A text-to-image pipeline with a flow-matching scheduler.
        guidance_scale: Given to guidance-distilled models.
    """

    def __init__(self, pipeline: DiffusionPipeline, *, guidance_scale: float):
        super().__init__()
        self.transformer = pipeline.transformer  # what accelerate wraps, moves and synchronises
        self.pipeline = pipeline
        self.call = inspect.unwrap(type(pipeline).__call__)  # without torch.no_grad
        self.guidance_scale = guidance_scale
        pipeline.scheduler = _OneStepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)

    def forward(self, prompts: list[str], latents: torch.Tensor, sigmas: torch.Tensor, resolution: int):
        """Latents as the pipeline packs them, sigmas [B] in (0, 1)."""
        self.pipeline.scheduler.sigmas_of_batch = sigmas
        options = {"guidance_scale": self.guidance_scale, "num_inference_steps": 1, "output_type": "latent"}
        try:
            self.call(self.pipeline, prompt=prompts, latents=latents, height=resolution, width=resolution, **options)
        except _VelocityPredicted as predicted:
            return predicted.args[0]
        raise ValueError(
            f"Expected {type(self.pipeline).__name__} to call its scheduler's step once, but it did not. It is not a "
            "flow-matching text-to-image pipeline of the usual kind."
        )


def pack(pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as the pipeline hands latents to its transformer; Flux and others make 2x2 patches of them."""
    if hasattr(pipeline, "_pack_latents"):  # the function that diffusers' own training scripts use
        return pipeline._pack_latents(latents, *latents.shape)
    return latents


def load_images(args: argparse.Namespace):
    source = (args.dataset_name,) if args.dataset_name else ("imagefolder",)
    dataset = load_dataset(*source, data_dir=args.train_data_dir, split="train")
    missing = {args.image_column, args.caption_column} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"Expected columns {sorted(missing)}, got {dataset.column_names}. Name them with --image_column and "
            "--caption_column; for an image folder write metadata.jsonl with file_name and text."
        )
    return dataset


def make_batch(dataset, args: argparse.Namespace, indices: list[int]) -> tuple[torch.Tensor, list[str]]:
    """Pixel values [B, 3, R, R] in [-1, 1] and captions."""
    records = [dataset[index] for index in indices]
    images = [center_crop(record[args.image_column].convert("RGB"), args.resolution) for record in records]
    return torch.stack([image_to_tensor(image) for image in images]), [r[args.caption_column] for r in records]


def prepare_transformer(
    pipeline: DiffusionPipeline, args: argparse.Namespace, frozen_dtype: torch.dtype
) -> list[torch.nn.Parameter]:
    """Freezes the pipeline and adds the LoRA; gives the parameters to train, in fp32."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    transformer = pipeline.transformer
    if args.full:
        transformer.requires_grad_(True)
    else:
        transformer.to(frozen_dtype)
        targets = args.lora_target_modules
        transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
        cast_training_params(transformer, dtype=torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def checkpoint_trained_weights_only(accelerator: Accelerator, transformer: torch.nn.Module) -> None:
    """Makes accelerate's checkpoints hold the trained weights instead of the whole model."""

    def trained():
        return {name: p for name, p in transformer.named_parameters() if p.requires_grad}

    def save(models, weights, folder):
        if accelerator.is_main_process:
            save_file({name: p.detach().contiguous() for name, p in trained().items()}, f"{folder}/{TRAINED_WEIGHTS}")
        weights.clear()

    def load(models, folder):
        state = load_file(f"{folder}/{TRAINED_WEIGHTS}")
        if state.keys() != trained().keys():
            raise ValueError(f"Expected a checkpoint of the same LoRA or of --full, got another in {folder}.")
        transformer.load_state_dict(state, strict=False)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_result(pipeline: DiffusionPipeline, args: argparse.Namespace) -> None:
    if args.full:
        pipeline.transformer.save_pretrained(Path(args.output_dir) / "transformer")
    else:
        layers = get_peft_model_state_dict(pipeline.transformer)
        type(pipeline).save_lora_weights(args.output_dir, transformer_lora_layers=layers)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(args.seed)  # the LoRA's initial weights
    dataset = load_images(args)

    # Model: frozen pipeline, LoRA, routes.
    name = args.pretrained_model_name_or_path
    check_model_index(DiffusionPipeline.load_config(name), name)
    pipeline = DiffusionPipeline.from_pretrained(name)
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"Expected a pipeline with FlowMatchEulerDiscreteScheduler, got {type(pipeline.scheduler).__name__}."
        )
    transformer = pipeline.transformer
    if args.guidance_scale != 1.0 and not transformer.config.get("guidance_embeds", False):
        raise ValueError("Expected a transformer with guidance_embeds for a --guidance_scale other than 1.0.")
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    parameters = prepare_transformer(pipeline, args, frozen_dtype)
    apply_token_routing(transformer, json.loads(args.routes))
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module) and component is not transformer:
            component.to(accelerator.device, frozen_dtype)

    # Optimiser, checkpoints.
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    velocity = PipelineVelocity(pipeline, guidance_scale=args.guidance_scale)
    velocity, optimizer = accelerator.prepare(velocity, optimizer)
    checkpoint_trained_weights_only(accelerator, transformer)
    settings = {key: value for key, value in vars(args).items() if key not in CONTROL_FLAGS}
    settings["num_processes"] = accelerator.num_processes
    checkpoint = open_run_folder(
        args.output_dir,
        settings=settings,
        free_settings=FREE_SETTINGS,
        fixed_settings=FIXED_SETTINGS,
        resume_from_checkpoint=args.resume_from_checkpoint,
        overwrite=args.overwrite_output_dir,
    )
    step = 0 if checkpoint is None else load_checkpoint(accelerator, checkpoint)["step"]

    progress = tqdm(
        initial=step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    batches = iter(
        EpochBatchSampler(
            len(dataset),
            batch_size=args.train_batch_size,
            seed=args.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            first_sample=step * samples_per_step,
        )
    )
    loss_sum, logged_step = torch.zeros((), device=accelerator.device), step
    while step < args.max_train_steps:
        is_routed = step < (1.0 - args.dense_fraction) * args.max_train_steps
        for micro_step in range(
            step * args.gradient_accumulation_steps, (step + 1) * args.gradient_accumulation_steps
        ):
            # Everything random about this forward: posterior sample, noise, noise levels, kept tokens.
            keys = (args.seed, micro_step, accelerator.process_index)
            generator = torch.Generator().manual_seed(derive_seed("noise", *keys))
            torch.manual_seed(derive_seed("sigmas", *keys))
            routing = {"enabled": is_routed, "seed": derive_seed("routing", *keys)}

            with accelerator.accumulate(velocity), token_routing(transformer, **routing):
                pixels, prompts = make_batch(dataset, args, [index for _, index in next(batches)])
                latents = encode_images(pipeline.vae, pixels.to(accelerator.device), generator=generator).float()
                noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                density = compute_density_for_timestep_sampling("logit_normal", len(prompts), 0.0, 1.0)
                sigmas = density.to(latents.device).clamp(1e-3, 1.0)  # B
                noisy = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1))

                prediction = velocity(prompts, pack(pipeline, noisy).to(frozen_dtype), sigmas, args.resolution)
                loss = F.mse_loss(prediction.float(), pack(pipeline, noise - latents))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach()
        step += 1
        progress.update()

        # Nothing waits for the device in between; a loss that was not finite stays in the sum.
        is_checkpoint = step % args.checkpointing_steps == 0 or step == args.max_train_steps
        if is_checkpoint or step % args.logging_steps == 0:
            mean_loss = loss_sum.item() / (step - logged_step) / args.gradient_accumulation_steps
            if not math.isfinite(mean_loss):
                raise ValueError(f"Expected a finite loss, got {mean_loss} before step {step}. Lower --learning_rate.")
            progress.set_postfix(loss=f"{mean_loss:.4f}", routed=is_routed)
            loss_sum.zero_()
            logged_step = step
        if is_checkpoint:
            limit = args.checkpoints_total_limit
            save_checkpoint(
                accelerator, args.output_dir, step, state={"step": step, "settings": settings}, total_limit=limit
            )

    if accelerator.is_main_process:
        save_result(pipeline, args)
    accelerator.end_training()


if __name__ == "__main__":
    main()
