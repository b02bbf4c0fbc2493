# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a class-conditional diffusion transformer with token routing (TREAD, arXiv 2501.04765).

    python examples/train_tread.py                                                # the digits recipe, no download
    accelerate launch examples/train_tread.py --recipe imagenet256_xl2 --output_dir runs/xl2

The same command goes on with a run that was killed. The flags are the fields of `TrainConfig`; docs/training.md.
"""

from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_tread import RoutingCall
from diffusers_tread.distributed import on_main_process
from diffusers_tread.flops import training_flops
from diffusers_tread.hub import open_repo
from diffusers_tread.runs import setup
from diffusers_tread.runs.checkpoints import load_checkpoint, save_checkpoint, settle_buckets
from diffusers_tread.runs.config import FREE_FIELDS
from diffusers_tread.runs.ema import update_ema
from diffusers_tread.runs.folder import RunFolder, open_run_folder
from diffusers_tread.runs.monitor import CorruptImages, LossMonitor, check_weights
from diffusers_tread.runs.outputs import RunOutputs
from diffusers_tread.runs.presets import parse_train_config
from diffusers_tread.runs.signals import StopRequest
from diffusers_tread.seeds import derive_seed


DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.json"  # without any data named


class Trainer:
    """Everything that lives through a run; `train` runs it."""

    def __init__(self, config, accelerator, source, model, settings, *, run: RunFolder, stop: StopRequest, extractor):
        self.config, self.accelerator, self.source, self.settings = config, accelerator, source, settings
        self.run, self.stop, self.max_steps = run, stop, settings["max_train_steps"]
        self.objective, self.terms = setup.make_objective(config), setup.make_terms(config, model)
        self.flops = {True: training_flops(model), False: training_flops(model, selection_ratio=0.0)}

        # Model and optimiser.
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile_repeated_blocks(dynamic=False)
        self.names = [name for name, _ in model.named_parameters()]
        self.model, self.optimizer = accelerator.prepare(model, setup.make_optimizer(config, model))
        self.parameters = list(self.model.parameters())
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.use_ema else None

        # Resume.
        state = {"global_step": 0, "samples_seen": 0}
        if run.checkpoint is not None:
            settle_buckets(self.model, (source.channels, *[source.latent_size] * 2), accelerator.device)
            state = load_checkpoint(accelerator, run.checkpoint, ema=self.ema, ema_names=self.names)
            accelerator.print(f"Resuming from {run.checkpoint}.")
        self.step, self.samples_seen = state["global_step"], state["samples_seen"]
        self.lr_scheduler = setup.make_lr_scheduler(config, self.optimizer, step=self.step, max_steps=self.max_steps)

        # Data, generator, what looks at the run.
        self.batches = source.batches(
            batch_size=config.train_batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            samples_seen=self.samples_seen,
            stream_positions=state.get("stream_positions"),
        )
        self.position = None
        self.corrupt = CorruptImages(config.max_corrupt_images, state.get("corrupt_images", []))
        self.generator, self.is_routed = torch.Generator(accelerator.device), True
        weights = self.parameters if self.ema is None else self.ema.shadow_params
        self.outputs = RunOutputs(
            config, accelerator, source, settings, run=run, weights=weights, names=self.names, step=self.step,
            scheduler=self.objective.scheduler(), extractor=extractor,
        )  # fmt: skip

    def train(self) -> None:
        config, accelerator = self.config, self.accelerator
        first_dense_step = round(self.max_steps * (1 - config.dense_fraction))
        outputs, push_steps = self.outputs, config.hub_push_steps or self.max_steps
        actions = {self.save_checkpoint: config.checkpointing_steps, outputs.save_grid: config.validation_steps}
        actions |= {outputs.measure_fid: config.eval_steps, outputs.push: push_steps if config.push_to_hub else None}
        if self.step > 0:  # the run may have been killed before it sampled what it had checkpointed
            for action in [action for action, every in list(actions.items())[1:] if self.is_due(every)]:
                action(self.step)
        self.model.train()
        total_batch_size = self.settings["total_batch_size"]
        monitor = LossMonitor(accelerator, step=self.step, samples_per_step=total_batch_size)
        is_quiet = not accelerator.is_main_process
        with tqdm(total=self.max_steps, initial=self.step, desc="Steps", disable=is_quiet) as progress:
            while self.step < self.max_steps:
                self.is_routed = self.step < first_dense_step
                monitor.add(self.train_step())
                self.step += 1
                self.samples_seen += total_batch_size
                progress.update()

                # A checkpoint or samples are only made of weights that were looked at.
                due = [action for action, every in actions.items() if self.is_due(every)]
                if is_stopped := self.stop.is_due():
                    due = [self.save_checkpoint]
                if due or self.step % config.logging_steps == 0:
                    self.log(progress, *monitor.read(self.step))
                if due:
                    check_weights(accelerator, self.parameters, step=self.step)
                for action in due:
                    action(self.step)
                if is_stopped:
                    self.stop.end(f"Saved checkpoint-{self.step} in {config.output_dir}")
                if due:
                    monitor.restart_clock()

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last one, happens now."""
        return every is not None and (self.step % every == 0 or self.step == self.max_steps)

    def train_step(self) -> torch.Tensor:
        """One optimiser step; the loss of this process as a tensor, so that nothing waits for the device."""
        accelerator, total = self.accelerator, 0.0
        for micro_step in range(self.config.gradient_accumulation_steps):
            latents, conditions, routing = self.next_batch(micro_step)
            options = {"generator": self.generator, "routing": routing, "terms": self.terms}
            with accelerator.accumulate(self.model):
                loss = self.objective.loss(self.model, latents, **conditions, **options).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.config.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach()
        self.lr_scheduler.step()
        if self.ema is not None:
            update_ema(self.ema, self.parameters)
        return total / self.config.gradient_accumulation_steps

    def next_batch(self, micro_step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], RoutingCall]:
        """Latents, conditions and how to route; seeds the generator. All draws are functions of where the run is."""
        seed = partial(derive_seed, self.config.seed, self.step, micro_step, self.accelerator.process_index)
        batch = next(self.batches)
        self.position = batch.get("position")
        self.corrupt.add(batch["corrupt"])

        # Labels: some become the null class, all of a model without classes.
        conditions, num_classes = dict(self.source.conditions(batch)), self.settings["num_classes"]
        draws = torch.rand(len(conditions["class_labels"]), generator=torch.Generator().manual_seed(seed("labels")))
        dropped = draws < (self.config.class_dropout_prob if num_classes else 1.0)
        conditions["class_labels"] = conditions["class_labels"].masked_fill(dropped, num_classes)
        device = self.accelerator.device
        conditions = {name: value.to(device, non_blocking=True) for name, value in conditions.items()}

        self.generator.manual_seed(seed("noise"))
        latents = self.source.to_latents(batch, device=device, generator=self.generator)
        return latents, conditions, RoutingCall(enabled=None if self.is_routed else False, seed=seed("routing"))

    def log(self, progress: tqdm, loss: float, images_per_second: float) -> None:
        values = {"loss": loss, "lr": self.lr_scheduler.get_last_lr()[0], "images_per_second": images_per_second}
        values["model_tflops_per_second"] = images_per_second * self.flops[self.is_routed] / 1e12
        values["block_flops_saved"] = self.settings["block_flops_saved"] if self.is_routed else 0.0
        shown = {"loss": f"{loss:.4f}", "img_s": f"{images_per_second:.1f}"}
        shown["flops_saved"] = f"{values['block_flops_saved']:.0%}"
        progress.set_postfix(shown | ({"corrupt": len(self.corrupt.names)} if self.corrupt.names else {}))
        self.accelerator.log(values, step=self.step)

    def save_checkpoint(self, step: int) -> None:
        state = {"global_step": step, "samples_seen": self.samples_seen, "settings": self.settings}
        state["corrupt_images"] = sorted(set(gather_object(sorted(self.corrupt.names))))
        if self.position is not None:
            state["stream_positions"] = gather_object([list(self.position)])
        options = {"state": state, "lineage": self.run.lineage, "total_limit": self.config.checkpoints_total_limit}
        options |= {"ema": self.ema, "ema_names": self.names}
        folder = save_checkpoint(self.accelerator, self.config.output_dir, step, **options)
        self.run.record(folder.name, "logs")


def main(argv: list[str] | None = None) -> None:
    config = parse_train_config(argv, description=__doc__.split("\n")[0], default_config=DIGITS_CONFIG)
    accelerator = setup.make_accelerator(config)
    torch.set_float32_matmul_precision(config.matmul_precision)

    # Everything is checked before anything is written.
    source, extractor = setup.open_data(config, accelerator), setup.open_feature_extractor(config, accelerator)
    setup.make_objective(config)
    with init_empty_weights():
        settings = setup.describe_run(config, accelerator, source, setup.make_model(config, source))
    accelerator.print(setup.settings_table(config, accelerator, settings))
    if config.dry_run:
        return accelerator.end_training()
    if config.push_to_hub:  # a token that may not write shows now
        on_main_process(lambda: str(open_repo(config.hub_model_id, private=config.hub_private)))

    # The run.
    options = {"resume_from_checkpoint": config.resume_from_checkpoint, "overwrite": config.overwrite_output_dir}
    options |= {"total_steps": settings["max_train_steps"], "free_settings": FREE_FIELDS, "fixed_settings": ("model",)}
    # What a config file asks for once, the command that goes on must not ask for again.
    overrides = ["--no-overwrite_output_dir"] if config.overwrite_output_dir else []
    overrides += ["--resume_from_checkpoint=latest"] if config.resume_from_checkpoint else []
    stop_request = StopRequest(argv, overrides=overrides)
    with open_run_folder(config.output_dir, settings=settings, **options) as run, stop_request as stop:
        setup.init_trackers(accelerator, config, settings)
        model = setup.make_model(config, source)
        trainer = Trainer(config, accelerator, source, model, settings, run=run, stop=stop, extractor=extractor)
        trainer.train()
        trainer.outputs.finish()
    accelerator.end_training()


if __name__ == "__main__":
    main()
