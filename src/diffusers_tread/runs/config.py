# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What training runs are told: frozen dataclasses whose fields are the flags of the scripts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.optimization import SchedulerType

from ..data import Buckets
from ..objectives import FlowMatchingObjective, find_objective


# Fields that say where and how to run, not what: no part of the run's settings.
CONTROL_FIELDS = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_push_steps"),
)
# Settings that leave the weights alone: they may change between the parts of one run.
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
    """What every training run is told.

    Raises:
        ValueError: A value out of its range; fields of which one needs or excludes another.
    """

    output_dir: str = "tread-model"
    """Checkpoints, samples, logs and, at the end, `pipeline`."""
    overwrite_output_dir: bool = False
    """Delete what an earlier run wrote in the output folder."""
    resume_from_checkpoint: str | None = None
    """"latest" or a checkpoint, to go on with changed settings. None resumes a folder that holds this very run."""
    seed: int = 0
    """Everything random follows from it."""
    dry_run: bool = False
    """Print the settings and write nothing. Data of the Hub are not fetched, nor with them the networks of loss terms
    that look at images: give resolution and num_classes."""

    # Data.
    data: str = "digits:"
    """digits: (scikit-learn's), folder:PATH, hub:NAME or latents:PATH, see `diffusers_tread.data.SOURCES`."""
    dataset_config_name: str | None = None
    """Configuration of a data set on the Hub; None for its only one."""
    dataset_split: str | None = None
    """Split to train on, of a folder the sub-folder; None for train, or the folder itself."""
    image_column: str = "image"
    """Column with images."""
    cache_dir: str | None = None
    """Where downloaded data are kept; None for the cache of `datasets`."""
    streaming: bool = False
    """Read the repository without downloading it first."""
    shuffle_buffer: int = 10_000
    """Records that the shuffle of a stream holds in memory."""
    resolution: int | None = None
    """Side of the training images in pixels; None for that of digits, latents or buckets."""
    aspect_ratio_buckets: str | None = None
    """Sizes of the training images as height,width;height,width instead of one square; None for squares."""
    background: str = "white"
    """Colour behind transparent images, such as white or #808080."""
    random_flip: bool = False
    """Flip images horizontally at random."""
    max_corrupt_images: int = 100
    """Unreadable images per process to replace, then an error."""
    dataloader_num_workers: int = 0
    """Processes (threads when streaming) that decode images."""

    # Model.
    routes: str | None = None
    """default, none or a JSON list with the fields of TokenRoute; None for the model's own."""
    dense_fraction: float = 0.15
    """Last share of the steps, in [0, 1], trained without routing."""

    # Objective and optimisation.
    objective_config: str = "{}"
    """Fields of the objective as JSON, such as {"shift": 3.0}, or "auto" for sqrt(C H W / 4096) of the latents."""
    train_batch_size: int = 16
    """Images per process and forward."""
    gradient_accumulation_steps: int = 1
    """Forwards per optimiser step."""
    num_train_epochs: int = 100
    """Length of the run without max_train_steps."""
    max_train_steps: int | None = None
    """Optimiser steps of the run; None for num_train_epochs."""
    optimizer: str = "adamw"
    """adamw; muon, which trains the matrices of attention and MLP in the blocks by Muon; or what was registered."""
    learning_rate: float = 1e-4
    """After the warm-up; not scaled by the batch."""
    lr_scheduler: str = "constant_with_warmup"
    """As in diffusers.optimization, but for piecewise_constant."""
    lr_warmup_steps: int = 0
    """Optimiser steps until the whole learning rate."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean."""
    adam_beta2: float = 0.999
    """Decay of AdamW's variance."""
    adam_weight_decay: float = 0.0
    """Weight decay of AdamW, on the weights of linear and convolutional layers."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    muon_learning_rate: float = 1e-3
    """Of what Muon trains; the schedule is that of learning_rate, which is for all else."""
    muon_momentum: float = 0.95
    """Muon's momentum, Nesterov's."""
    muon_weight_decay: float = 0.0
    """Weight decay of what Muon trains."""
    muon_adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """How Muon's rate follows a matrix's shape, see torch.optim.Muon."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped; 0 for no clipping."""
    use_ema: bool = False
    """Average the weights; validate with the average and save it."""
    ema_decay: float = 0.9999
    """Decay per optimiser step, in [0, 1], reached after a warm-up."""

    # Hardware.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forwards; None for what `accelerate config` says."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass to save memory."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products, see torch.set_float32_matmul_precision; high is TF32 on NVIDIA GPUs."""

    # Checkpoints, logs, samples.
    checkpointing_steps: int = 500
    """Steps between checkpoints; one more ends the run."""
    checkpoints_total_limit: int | None = None
    """Checkpoints to keep; None for all."""
    logging_steps: int = 10
    """Steps between logs and checks for a loss that is not finite."""
    log_loss_by_time: bool = False
    """Log loss_t0 to loss_t3 too: of the quarters of each process's batches, from the least noise to the most."""
    report_to: str = "none"
    """tensorboard, wandb, trackio, all or none; what they write lies in the output folder."""
    tracker_project_name: str = "train_tread"
    """Name of the run's project in the tracker."""
    validation_steps: int | None = None
    """Steps between sample grids; None for no grids."""
    num_validation_images: int = 20
    """Samples in a grid, of one class after the other."""
    validation_inference_steps: int = 20
    """Sampling steps of a grid."""
    validation_guidance_scale: float = 1.0
    """Classifier-free guidance of a grid; 1 for none."""

    # Metrics while training.
    eval_steps: int | None = None
    """Steps between measurements of the FID; None for no measurement."""
    eval_reference: str | None = None
    """What samples are compared with: statistics or images in an .npz, or a folder of images."""
    eval_feature_extractor: str = "inception"
    """Network whose features are compared."""
    eval_feature_extractor_weights: str | None = None
    """File with its weights; None to download them."""
    eval_num_samples: int = 10_000
    """Samples of a measurement, of all processes together."""
    eval_batch_size: int = 32
    """Samples per process and forward."""
    eval_inference_steps: int = 20
    """Sampling steps of a measurement."""
    eval_guidance_scale: float = 1.0
    """Classifier-free guidance of a measurement; 1 for none."""

    # The Hub.
    push_to_hub: bool = False
    """Push the finished pipeline, with a model card."""
    hub_model_id: str | None = None
    """Repository to push to, "organisation/name"."""
    hub_private: bool | None = None
    """Whether a new repository is private; None for what its owner has set."""
    hub_push_steps: int | None = None
    """Steps between pushes while training goes on; None for the end alone."""

    def __post_init__(self):
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
        """Sizes of the training images; None for squares. Raises ValueError for a text that names none."""
        return None if self.aspect_ratio_buckets is None else Buckets.parse(self.aspect_ratio_buckets)

    def data_options(self) -> dict[str, Any]:
        """What `open_source` is told besides `data`."""
        names = ("dataset_config_name", "image_column", "cache_dir", "streaming", "shuffle_buffer", "resolution")
        names += ("background", "random_flip", "seed")
        options = {"split": self.dataset_split, "buckets": self.buckets()}
        return {name: getattr(self, name) for name in names} | options


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """How a class-conditional denoiser is trained, by examples/train_tread.py.

    Raises:
        ValueError: As `RunConfig`; an unknown objective; no size of the model, or two.
    """

    # Data.
    label_column: str = "label"
    """Column with class labels."""
    num_classes: int | None = None
    """Number of classes; None for as many as the data have, 0 to train without classes."""
    pretrained_vae_name_or_path: str | None = None
    """VAE to encode images with; for latents where the VAE that made them lies now, None for where it lay then."""

    # Model.
    preset: str | None = None
    """Size of the model, S/2 to XL/8, LightningDiT-XL/1, JiT-B/16, Mamba-S/2, ..."""
    preset_config: str | None = None
    """Settings of the model over those of the preset as JSON, such as {"patch_bottleneck_dim": 128}."""
    model_config_name_or_path: str | None = None
    """Instead of a preset: a model folder, a JSON file or the JSON itself."""

    # Objective.
    objective: str = FlowMatchingObjective.name
    """What is predicted: edm, flow, epsilon, jit, or what was registered."""
    loss_terms: str = "{}"
    """Further terms as JSON, such as {"reconstruction": {"weight": 0.1}}."""
    class_dropout_prob: float = 0.1
    """Share of labels, in [0, 1], replaced by the null class."""

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
