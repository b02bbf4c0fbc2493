# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Configs of training runs: frozen dataclasses whose fields are the flags of the scripts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.optimization import SchedulerType

from ..data import Buckets
from ..objectives import FlowMatchingObjective, find_objective


# Fields that say where and how to run, not what to train: they are not part of the run's settings.
CONTROL_FIELDS = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_push_steps"),
)
# Settings that do not change the weights: they may differ when a run is resumed.
FREE_FIELDS = (
    *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to", "tracker_project_name"),
    "log_loss_by_time",
    *("validation_steps", "num_validation_images", "validation_inference_steps", "validation_guidance_scale"),
    *("eval_steps", "eval_reference", "eval_feature_extractor", "eval_feature_extractor_weights"),
    *("eval_num_samples", "eval_batch_size", "eval_inference_steps", "eval_guidance_scale"),
    *("validation_prompts", "eval_prompts"),
    *("dataloader_num_workers", "cache_dir", "max_corrupt_images"),
)
_POSITIVE = (
    *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "checkpointing_steps"),
    *("checkpoints_total_limit", "logging_steps", "validation_steps", "num_validation_images", "shuffle_buffer"),
    *("resolution", "validation_inference_steps", "learning_rate", "eval_steps", "eval_num_samples"),
    *("eval_batch_size", "eval_inference_steps", "hub_push_steps", "muon_learning_rate"),
)
_NOT_NEGATIVE = (
    *("num_classes", "lr_warmup_steps", "max_grad_norm", "dataloader_num_workers", "max_corrupt_images"),
    *("adam_weight_decay", "adam_epsilon", "muon_weight_decay"),
)
_SHARES = ("dense_fraction", "class_dropout_prob", "ema_decay")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that all training runs have in common.

    Raises:
        ValueError: A value is out of its range, or fields contradict each other.
    """

    output_dir: str = "tread-model"
    """Folder for checkpoints, samples, logs and, at the end, `pipeline`."""
    overwrite_output_dir: bool = False
    """Delete what an earlier run wrote in the output folder."""
    resume_from_checkpoint: str | None = None
    """Go on from "latest" or from this checkpoint, also with changed settings. None resumes the run in output_dir if
    it has the same settings."""
    seed: int = 0
    """Seed of all random draws."""
    dry_run: bool = False
    """Print the settings and write nothing. Data that are not on this machine are not downloaded, nor are the networks
    of loss terms that look at their images; give resolution and num_classes instead."""

    # Data.
    data: str = "digits:"
    """Training data: digits: (scikit-learn's), folder:PATH, hub:NAME or latents:PATH, see
    `diffusers_tread.data.SOURCES`."""
    dataset_config_name: str | None = None
    """Configuration of a data set on the Hub; None if it has only one."""
    dataset_split: str | None = None
    """Split to train on, or sub-folder of a folder; None for the split train, or the folder itself."""
    image_column: str = "image"
    """Column with images."""
    cache_dir: str | None = None
    """Where downloaded data are kept; None for the cache of `datasets`."""
    streaming: bool = False
    """Stream the data set from the Hub instead of downloading it first."""
    shuffle_buffer: int = 10_000
    """Records held in memory to shuffle a stream."""
    resolution: int | None = None
    """Side of the training images in pixels; None takes it from digits, latents or buckets."""
    aspect_ratio_buckets: str | None = None
    """Sizes of the training images in pixels, as height,width;height,width; None for squares of resolution."""
    background: str = "white"
    """Colour put behind transparent images, such as white or #808080."""
    random_flip: bool = False
    """Flip images horizontally at random."""
    max_corrupt_images: int = 100
    """Unreadable images that each process replaces; one more is an error."""
    dataloader_num_workers: int = 0
    """Processes (threads when streaming) that decode images."""

    # Model.
    routes: str | None = None
    """Token routes: default, none or a JSON list with the fields of TokenRoute; None for the model's own."""
    dense_fraction: float = 0.15
    """Share of the steps, in [0, 1], trained without routing at the end of the run."""

    # Objective and optimisation.
    objective_config: str = "{}"
    """Fields of the objective as JSON, such as {"shift": 3.0}; {"shift": "auto"} is sqrt(C H W / 4096) of the
    latents."""
    train_batch_size: int = 16
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    num_train_epochs: int = 100
    """Length of the run in epochs, if max_train_steps is not given."""
    max_train_steps: int | None = None
    """Length of the run in optimiser steps; None for num_train_epochs."""
    optimizer: str = "adamw"
    """adamw; muon, which uses Muon for the attention and MLP matrices of the blocks and AdamW for the rest; or a
    registered optimiser."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW after the warm-up; not scaled by the batch size."""
    lr_scheduler: str = "constant_with_warmup"
    """Any schedule of diffusers.optimization except piecewise_constant."""
    lr_warmup_steps: int = 0
    """Optimiser steps of the warm-up, after which the learning rate is reached."""
    adam_beta1: float = 0.9
    """Decay of AdamW's average of the gradient, in [0, 1)."""
    adam_beta2: float = 0.999
    """Decay of AdamW's average of the squared gradient, in [0, 1)."""
    adam_weight_decay: float = 0.0
    """Weight decay of AdamW, on the weights of linear and convolutional layers."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    muon_learning_rate: float = 1e-3
    """Learning rate of the matrices that Muon trains, with the same schedule; learning_rate is for all else."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon, in [0, 1)."""
    muon_weight_decay: float = 0.0
    """Weight decay of the matrices that Muon trains."""
    muon_adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """How Muon adapts its learning rate to the shape of a matrix, see torch.optim.Muon."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped; 0 for no clipping."""
    use_ema: bool = False
    """Keep a moving average of the weights, which is used for samples and saved at the end."""
    ema_decay: float = 0.9999
    """Decay of the average per optimiser step, in [0, 1], reached after a warm-up."""

    # Hardware.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward passes; None for the setting of `accelerate config`."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass to save memory."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products, see torch.set_float32_matmul_precision; high is TF32 on NVIDIA GPUs."""

    # Checkpoints, logs, samples.
    checkpointing_steps: int = 500
    """Optimiser steps between checkpoints; a last one is written at the end of the run."""
    checkpoints_total_limit: int | None = None
    """Number of checkpoints to keep; None for all."""
    logging_steps: int = 10
    """Steps between log entries, at which the loss is also checked to be finite."""
    log_loss_by_time: bool = False
    """Also log loss_t0 to loss_t3, the loss of each quarter of a batch, sorted from the least noise to the most."""
    report_to: str = "none"
    """Tracker: tensorboard, wandb, trackio, all or none. Its files are written to the output folder."""
    tracker_project_name: str = "train_tread"
    """Name of the project in the tracker."""
    validation_steps: int | None = None
    """Steps between sample grids; None for no grids."""
    num_validation_images: int = 20
    """Number of samples in a grid, cycling through the classes."""
    validation_inference_steps: int = 20
    """Sampling steps for a grid."""
    validation_guidance_scale: float = 1.0
    """Scale of classifier-free guidance for a grid; 1 for none."""

    # Metrics while training.
    eval_steps: int | None = None
    """Steps between measurements of the FID; None for no measurement."""
    eval_reference: str | None = None
    """Reference of the FID: an .npz file with statistics or images, or a folder of images."""
    eval_feature_extractor: str = "inception"
    """Network whose features are compared."""
    eval_feature_extractor_weights: str | None = None
    """File with the weights of this network; None to download them."""
    eval_num_samples: int = 10_000
    """Samples per measurement, over all processes together."""
    eval_batch_size: int = 32
    """Samples per process and forward pass."""
    eval_inference_steps: int = 20
    """Sampling steps for a measurement."""
    eval_guidance_scale: float = 1.0
    """Scale of classifier-free guidance for a measurement; 1 for none."""

    # The Hub.
    push_to_hub: bool = False
    """Push the finished pipeline to the Hub, with a model card."""
    hub_model_id: str | None = None
    """Repository to push to, "organisation/name"."""
    hub_private: bool | None = None
    """Whether a new repository is private; None for its owner's default."""
    hub_push_steps: int | None = None
    """Steps between pushes in the background during training; None to push only at the end."""

    def __post_init__(self):
        # Each value in its range.
        self.buckets()
        schedules = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
        if self.lr_scheduler not in schedules:
            raise ValueError(f"Expected --lr_scheduler among {schedules}, got {self.lr_scheduler!r}.")
        for name in _POSITIVE:
            if (value := getattr(self, name, None)) is not None and not value > 0:
                raise ValueError(f"Expected --{name} > 0, got {value}.")
        for name in _NOT_NEGATIVE:
            if (value := getattr(self, name, None)) is not None and not value >= 0:
                raise ValueError(f"Expected --{name} >= 0, got {value}.")
        for name in _SHARES:
            if not 0.0 <= (value := getattr(self, name, 0.0)) <= 1.0:
                raise ValueError(f"Expected --{name} in [0, 1], got {value}.")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"Expected --{name} in [0, 1), got {value}.")

        # Values that need or exclude each other.
        if self.log_loss_by_time and self.train_batch_size < 4:
            raise ValueError(f"Expected --train_batch_size >= 4 with --log_loss_by_time, got {self.train_batch_size}.")
        fields = {field.name: field.default for field in dataclasses.fields(self) if field.name.startswith("muon_")}
        changed = [name for name, default in fields.items() if getattr(self, name) != default]
        if changed and self.optimizer != "muon":
            raise ValueError(f"Expected --optimizer muon with {changed}, got {self.optimizer!r}. Leave them out.")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("Expected one of --overwrite_output_dir and --resume_from_checkpoint, got both.")
        if self.eval_steps is not None and (self.eval_reference is None or not Path(self.eval_reference).exists()):
            raise ValueError(
                f"Expected --eval_reference, an .npz or a folder of images, for --eval_steps, got "
                f"{self.eval_reference!r}."
            )
        if self.push_to_hub and "/" not in (self.hub_model_id or ""):
            raise ValueError(
                f'Expected --hub_model_id "organisation/name" with --push_to_hub, got {self.hub_model_id!r}.'
            )
        if self.hub_push_steps is not None and not self.push_to_hub:
            raise ValueError("Expected --push_to_hub with --hub_push_steps, got the latter alone.")
        if self.streaming and self.max_train_steps is None:
            raise ValueError("Expected --max_train_steps with --streaming, whose length is not known.")

    def buckets(self) -> Buckets | None:
        """Sizes of the training images; None for squares. Raises ValueError if they cannot be parsed."""
        return None if self.aspect_ratio_buckets is None else Buckets.parse(self.aspect_ratio_buckets)

    def data_options(self) -> dict[str, Any]:
        """The arguments of `open_source` besides `data`."""
        names = ("dataset_config_name", "image_column", "cache_dir", "streaming", "shuffle_buffer", "resolution")
        names += ("background", "random_flip", "seed")
        options = {"split": self.dataset_split, "buckets": self.buckets()}
        return {name: getattr(self, name) for name in names} | options


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Settings of a class-conditional training run, by examples/train_tread.py.

    Raises:
        ValueError: As for `RunConfig`; an unknown objective; neither a preset nor a model config, or both.
    """

    # Data.
    label_column: str = "label"
    """Column with class labels."""
    num_classes: int | None = None
    """Number of classes; None for the number in the data, 0 to train without classes."""
    pretrained_vae_name_or_path: str | None = None
    """VAE to encode images with. For stored latents: where the VAE that made them is now; None if it has not moved."""

    # Model.
    preset: str | None = None
    """Kind and size of the model: S/2 to XL/8, LightningDiT-XL/1, JiT-B/16, Mamba-S/2, ..."""
    preset_config: str | None = None
    """Changes to the preset's model settings as JSON, such as {"patch_bottleneck_dim": 128}."""
    model_config_name_or_path: str | None = None
    """Model config, instead of a preset: a model folder, a JSON file or the JSON itself."""

    # Objective.
    objective: str = FlowMatchingObjective.name
    """Training objective: edm, flow, epsilon, jit, or the name of a registered one."""
    loss_terms: str = "{}"
    """Further terms of the loss as JSON, such as {"reconstruction": {"weight": 0.1}}."""
    class_dropout_prob: float = 0.1
    """Share of labels, in [0, 1], replaced by the null class, for classifier-free guidance."""

    def __post_init__(self):
        super().__post_init__()
        find_objective(self.objective)
        if (self.preset is None) == (self.model_config_name_or_path is None):
            raise ValueError("Expected either --preset or --model_config_name_or_path for the size of the model.")
        if self.preset is None and self.preset_config is not None:
            raise ValueError("Expected --preset with --preset_config, which changes one, got the latter alone.")

    def data_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("label_column", "pretrained_vae_name_or_path")}
        return super().data_options() | options | {"num_classes": self.num_classes or None}
