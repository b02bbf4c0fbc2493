# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a class-conditional diffusion transformer with token routing (TREAD, arXiv 2501.04765).

    python examples/train_tread.py                                                # the digits recipe, no download
    accelerate launch examples/train_tread.py --config examples/configs/imagenet256_xl2.json --output_dir runs/xl2

The same command goes on with a run that was killed. The flags are in train_tread_args.py, what is made of them in
train_tread_setup.py. See docs/training.md.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from train_tread_args import FREE_SETTINGS, parse_args
from train_tread_setup import (
    load_vae,
    make_accelerator,
    make_model,
    make_objective,
    make_terms,
    name_data,
    open_data,
    open_feature_extractor,
    open_fid_curve,
    print_settings,
    resolve_settings,
)

from diffusers_tread import RoutingCall, TREADPipeline
from diffusers_tread.data import encode_images, make_batches
from diffusers_tread.data.latents import latents_from_moments
from diffusers_tread.distributed import on_main_process
from diffusers_tread.files import whole
from diffusers_tread.flops import training_flops
from diffusers_tread.hub import BackgroundPush, CardDetails, open_repo
from diffusers_tread.models import make_denoiser
from diffusers_tread.pictures import make_grid, save_image
from diffusers_tread.runs.checkpoints import load_checkpoint, save_checkpoint
from diffusers_tread.runs.ema import update_ema, whole_weights
from diffusers_tread.runs.fid_curve import PICTURE, RECORDS
from diffusers_tread.runs.folder import PIPELINE, RunFolder, open_run_folder
from diffusers_tread.runs.monitor import LossMonitor, check_weights
from diffusers_tread.runs.signals import StopRequest
from diffusers_tread.seeds import derive_seed


logger = get_logger(__name__)


class Trainer:
    """Everything that lives through a run; `train` runs it."""

    def __init__(
        self,
        args,
        accelerator,
        *,
        objective,
        dataset,
        vae,
        model,
        settings,
        run: RunFolder,
        stop: StopRequest,
        extractor,
    ):
        self.args, self.accelerator, self.objective, self.vae = args, accelerator, objective, vae
        self.run, self.stop = run, stop
        self.id2label, self.num_classes, self.settings = dataset.id2label, dataset.num_classes, settings
        self.latents_info = getattr(dataset, "info", None)

        # Model.
        self.terms = make_terms(args, model)
        self.flops = {True: training_flops(model), False: training_flops(model, selection_ratio=0.0)}
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
        self.ema = EMAModel(self.parameters, decay=args.ema_decay) if args.use_ema else None

        # Resume. The learning rate is a function of the step, so that it needs no state.
        state = {"global_step": 0, "samples_seen": 0}
        if run.checkpoint is not None:
            self.settle_buckets()
            state = load_checkpoint(accelerator, run.checkpoint, ema=self.ema, ema_names=self.names)
            accelerator.print(f"Resuming from {run.checkpoint}.")
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
        self.background_push = None
        if args.push_to_hub and accelerator.is_main_process:
            folder = Path(args.output_dir, "hub")
            self.background_push = BackgroundPush(args.hub_model_id, folder, private=args.hub_private)
        self.position, self.corrupt = None, set(state.get("corrupt_images", []))
        self.generator, self.is_routed = torch.Generator(accelerator.device), True
        self.fid_curve = None
        if extractor is not None:
            size = dataset.resolution
            self.fid_curve = open_fid_curve(args, accelerator, extractor=extractor, image_size=size, step=self.step)

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
        total_batch_size = self.settings["total_batch_size"]
        progress = tqdm(
            total=args.max_train_steps, initial=self.step, desc="Steps", disable=not accelerator.is_main_process
        )
        self.model.train()
        actions = (
            (self.save_checkpoint, args.checkpointing_steps),
            (self.validate, args.validation_steps),
            (self.evaluate, args.eval_steps),
            (self.push, (args.hub_push_steps or args.max_train_steps) if args.push_to_hub else None),
        )
        if self.step > 0:  # the run may have been killed before it sampled what it had checkpointed
            for action in [action for action, every in actions[1:] if self.is_due(every)]:
                action()
        monitor = LossMonitor(accelerator, step=self.step, samples_per_step=total_batch_size)
        while self.step < args.max_train_steps:
            self.is_routed = self.step < first_dense_step
            monitor.add(self.train_step())
            self.step += 1
            self.samples_seen += total_batch_size
            progress.update()

            # A checkpoint or samples are only made of weights that were looked at.
            due = [action for action, every in actions if self.is_due(every)]
            if is_stopped := self.stop.is_due():
                due = [self.save_checkpoint]
            if due or self.step % args.logging_steps == 0:
                self.log(progress, *monitor.read(self.step))
            if due:
                check_weights(accelerator, self.parameters, step=self.step)
            for action in due:
                action()
            if is_stopped:
                self.stop.end(f"Saved checkpoint-{self.step} in {args.output_dir}")
            if due:
                monitor.restart_clock()
        progress.close()

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last one, happens now."""
        return every is not None and (self.step % every == 0 or self.step == self.args.max_train_steps)

    def train_step(self) -> torch.Tensor:
        """One optimiser step; the loss of this process as a tensor, so that nothing waits for the device."""
        accelerator, total = self.accelerator, 0.0
        for micro_step in range(self.args.gradient_accumulation_steps):
            latents, class_labels, routing = self.next_batch(micro_step)
            with accelerator.accumulate(self.model):
                loss = self.objective.loss(
                    self.model,
                    latents,
                    class_labels=class_labels,
                    generator=self.generator,
                    routing=routing,
                    terms=self.terms,
                ).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach()
        self.lr_scheduler.step()
        if self.ema is not None:
            update_ema(self.ema, self.parameters)
        return total / self.args.gradient_accumulation_steps

    def next_batch(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor, RoutingCall]:
        """Latents, labels and how to route; seeds the generator. All draws are functions of where the run is."""
        seed = partial(derive_seed, self.args.seed, self.step, micro_step, self.accelerator.process_index)
        batch = next(self.batches)
        self.note_corrupt(batch)

        # Labels: some become the null class.
        draws = torch.rand(len(batch["class_labels"]), generator=torch.Generator().manual_seed(seed("labels")))
        labels = batch["class_labels"].masked_fill(draws < self.args.class_dropout_prob, self.num_classes)
        labels = labels.to(self.accelerator.device, non_blocking=True)

        # Latents.
        self.generator.manual_seed(seed("noise"))
        routing = RoutingCall(enabled=None if self.is_routed else False, seed=seed("routing"))
        return self.make_latents(batch), labels, routing

    def make_latents(self, batch: dict[str, Any]) -> torch.Tensor:
        if self.latents_info is not None:
            moments = batch["moments"].to(self.accelerator.device, non_blocking=True)
            return latents_from_moments(moments, self.latents_info, generator=self.generator)
        pixel_values = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        return pixel_values if self.vae is None else encode_images(self.vae, pixel_values, generator=self.generator)

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

    def log(self, progress: tqdm, loss: float, images_per_second: float) -> None:
        values = {
            "loss": loss,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "images_per_second": images_per_second,
            "model_tflops_per_second": images_per_second * self.flops[self.is_routed] / 1e12,
            "block_flops_saved": self.settings["block_flops_saved"] if self.is_routed else 0.0,
        }
        progress.set_postfix(
            loss=f"{loss:.4f}",
            img_s=f"{images_per_second:.1f}",
            flops_saved=f"{values['block_flops_saved']:.0%}",
            **({"corrupt": len(self.corrupt)} if self.corrupt else {}),
        )
        self.accelerator.log(values, step=self.step)

    def save_checkpoint(self) -> None:
        state = {
            "global_step": self.step,
            "samples_seen": self.samples_seen,
            "corrupt_images": sorted(set(gather_object(sorted(self.corrupt)))),
            "settings": self.settings,
        }
        if self.position is not None:
            state["stream_positions"] = gather_object([list(self.position)])
        folder = save_checkpoint(
            self.accelerator,
            self.args.output_dir,
            self.step,
            state=state,
            lineage=self.run.lineage,
            ema=self.ema,
            ema_names=self.names,
            total_limit=self.args.checkpoints_total_limit,
        )
        self.run.record(folder.name, "logs")

    def make_pipeline(self) -> TREADPipeline:
        """A pipeline with a transformer of its own that holds the averaged weights, if there are any; eager, dense.

        Using it leaves the training alone. All processes call this together, because sharded weights are gathered.
        """
        weights = self.parameters if self.ema is None else self.ema.shadow_params
        device = self.accelerator.device
        with init_empty_weights():
            transformer = make_denoiser(self.settings["model_class"], **self.settings["model"])
        transformer.load_state_dict(whole_weights(weights, self.names, device=device), assign=True)
        transformer.requires_grad_(False).to(device)
        transformer.forward = self.accelerator.autocast()(transformer.forward)
        pipeline = TREADPipeline(
            transformer=transformer, scheduler=self.objective.scheduler(), vae=self.vae, id2label=self.id2label
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def validate(self) -> None:
        """A grid of samples, dense, with the averaged weights."""
        args, pipeline = self.args, self.make_pipeline()
        if self.accelerator.is_main_process:
            labels = [index % self.num_classes for index in range(args.num_validation_images)]
            seeds = [derive_seed(args.seed, "validation", index) for index in range(args.num_validation_images)]
            images = pipeline(
                class_labels=labels,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
            grid = make_grid(images)
            picture = Path("samples", f"step-{self.step:07d}.png")
            save_image(grid, args.output_dir / picture)
            self.run.record(picture)
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):  # not all have it
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    pixels = np.asarray(grid.convert("RGB"))[None]
                    tracker.log_images({"validation": pixels}, step=self.step, **options)
        self.accelerator.wait_for_everyone()

    def evaluate(self) -> None:
        """The FID of samples, dense, with the averaged weights; once for each step."""
        if self.fid_curve.has(self.step):
            return
        fid = self.fid_curve.measure(self.make_pipeline(), step=self.step)
        self.run.record("eval", RECORDS, PICTURE)
        self.accelerator.print(f"Step {self.step}: FID {fid:.4g} of {self.args.eval_num_samples} samples.")
        self.accelerator.log({"fid": fid}, step=self.step)

    def save_pipeline(self) -> None:
        """`output_dir/pipeline`, whole or not at all, with the averaged weights if there are any."""
        pipeline = self.make_pipeline()
        if self.accelerator.is_main_process:
            with whole(Path(self.args.output_dir, PIPELINE)) as folder:
                pipeline.save_pretrained(folder)
            self.run.record(PIPELINE, "logs")
        self.accelerator.wait_for_everyone()

    def push(self) -> None:
        """Starts a push of what `make_pipeline` makes."""
        args, pipeline, is_last = self.args, self.make_pipeline(), self.step == self.args.max_train_steps
        if self.background_push is None:
            return
        pictures = sorted(Path(args.output_dir, "samples").glob("step-*.png"))
        pictures = [path for path in pictures if path.stem <= f"step-{self.step:07d}"]  # others are of another branch
        card = CardDetails(
            dataset=name_data(args, self.latents_info),
            samples=PIL.Image.open(pictures[-1]) if pictures else None,
            step=None if is_last else self.step,
            training=self.settings,
        )
        if is_last:  # the one that must not be left out because another is not finished
            self.background_push.wait()
        self.background_push.start(pipeline, commit_message=f"Step {self.step}", card=card)
        self.run.record("hub")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, description=__doc__.split("\n")[0])
    accelerator = make_accelerator(args)
    torch.set_float32_matmul_precision(args.matmul_precision)

    # Data, objective, model: everything is checked before anything is written.
    dataset, objective = open_data(args, accelerator), make_objective(args)
    vae, channels, sample_size = load_vae(args, dataset)
    extractor = open_feature_extractor(args, accelerator)
    build = partial(make_model, args, channels=channels, sample_size=sample_size, num_classes=dataset.num_classes)
    with init_empty_weights():
        settings = resolve_settings(args, accelerator, dataset=dataset, model=build())
    if accelerator.is_main_process:
        print_settings(settings)
    if args.dry_run:
        return accelerator.end_training()

    if args.push_to_hub:  # a token that may not write shows now
        on_main_process(lambda: str(open_repo(args.hub_model_id, private=args.hub_private)))

    # Output folder.
    run_folder = open_run_folder(
        args.output_dir,
        settings=settings,
        total_steps=settings["max_train_steps"],
        free_settings=FREE_SETTINGS,
        resume_from_checkpoint=args.resume_from_checkpoint,
        overwrite=args.overwrite_output_dir,
        fixed_settings=("model",),
    )
    # What a config file asks for once, a command that goes on must not ask for again.
    overrides = ["--no-overwrite_output_dir"] if args.config and args.overwrite_output_dir else []
    overrides += ["--resume_from_checkpoint=latest"] if args.config and args.resume_from_checkpoint else []
    with run_folder as run, StopRequest(argv, overrides=overrides) as stop:
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
            run=run,
            stop=stop,
            extractor=extractor,
        )
        trainer.train()
        trainer.save_pipeline()
        accelerator.print(f"Saved {Path(args.output_dir, PIPELINE)}.")
        if trainer.background_push is not None:
            trainer.background_push.wait()
    accelerator.end_training()


if __name__ == "__main__":
    main()
