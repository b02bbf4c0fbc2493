# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a class-conditional diffusion transformer with token routing (TREAD, arXiv 2501.04765).

    python examples/train_tread.py                                                # the digits recipe, no download
    accelerate launch examples/train_tread.py --recipe imagenet256_xl2 --output_dir runs/xl2

Run the same command to resume a killed run. The flags are the fields of `TrainConfig`, see docs/training.md.
"""

from typing import Any

from diffusers_tread.installation import require


require("train", "accelerate", "datasets", "psutil", "tyro")

import torch
from accelerate import init_empty_weights

from diffusers_tread.distributed import on_main_process
from diffusers_tread.flops import training_flops
from diffusers_tread.hub import open_repo
from diffusers_tread.objectives import DenoiserWithHeads
from diffusers_tread.runs import setup
from diffusers_tread.runs.ema import update_ema
from diffusers_tread.runs.outputs import ClassOutputs
from diffusers_tread.runs.presets import DIGITS, parse_train_config
from diffusers_tread.runs.trainer import TrainingLoop, open_run


class Trainer(TrainingLoop):
    """The training step of a class-conditional model; the loop around it is shared by all training scripts."""

    def __init__(self, config, accelerator, source, model, settings, *, extractor, **context):
        # Model and loss terms.
        self.terms = setup.make_terms(config, model)
        flops = {True: training_flops(model), False: training_flops(model, selection_ratio=0.0)}
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile_repeated_blocks(dynamic=False)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if any(term.heads for term in self.terms):
            model = DenoiserWithHeads(model, self.terms)

        # Loop and outputs.
        super().__init__(config, accelerator, source, model, settings, flops=flops, **context)
        self.outputs = ClassOutputs(
            config, accelerator, source, settings, run=self.run, weights=self.weights[: len(names)], names=names,
            scheduler=self.objective.scheduler(), extractor=extractor, step=self.step,
        )  # fmt: skip

    def train_step(self) -> torch.Tensor:
        accelerator, total = self.accelerator, 0.0
        for micro_step in range(self.config.gradient_accumulation_steps):
            # Batch.
            latents, conditions, routing = self.next_batch(micro_step)
            options = {"generator": self.generator, "routing": routing}
            options["terms"] = [*self.terms, *self.watching]
            options |= {"images": self.images, "image_features": self.image_features, "step": self.step}

            # Forward, backward and, after the last micro step, the optimiser.
            with accelerator.accumulate(self.model):
                loss = self.objective.loss(self.model, latents, **conditions, **options).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.config.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach()

        # Learning rate and average.
        self.lr_scheduler.step()
        if self.ema is not None:
            update_ema(self.ema, self.parameters)
        return total / self.config.gradient_accumulation_steps

    def conditions(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The labels, of which some become the null class; for a model without classes, all of them."""
        conditions, num_classes = dict(self.source.conditions(batch)), self.settings["num_classes"]
        draws = torch.rand(len(conditions["class_labels"]), generator=generator)
        dropped = draws < (self.config.class_dropout_prob if num_classes else 1.0)
        conditions["class_labels"] = conditions["class_labels"].masked_fill(dropped, num_classes)
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in conditions.items()}

    def null_conditions(self) -> dict[str, torch.Tensor]:
        return {"class_labels": torch.tensor([self.settings["num_classes"]], device=self.accelerator.device)}


def main(argv: list[str] | None = None) -> None:
    config = parse_train_config(argv, description=__doc__.split("\n")[0], default_config=DIGITS)
    accelerator = setup.make_accelerator(config)
    torch.set_float32_matmul_precision(config.matmul_precision)

    # Check everything before anything is written.
    source, extractor = setup.open_data(config, accelerator), setup.open_feature_extractor(config, accelerator)
    setup.make_objective(config, source)
    with init_empty_weights():
        model = setup.make_model(config, source)
    settings = setup.describe_run(config, accelerator, source, model)
    about = setup.describe_classes(config, settings)
    accelerator.print(setup.settings_table(config, accelerator, settings, about))
    if config.dry_run:
        return accelerator.end_training()
    if config.push_to_hub:  # to find a token without write access now
        on_main_process(lambda: str(open_repo(config.hub_model_id, private=config.hub_private)))

    # Train.
    with open_run(config, accelerator, settings, argv, fixed_settings=("model", "optimizer", "heads")) as context:
        model = setup.make_model(config, source)
        trainer = Trainer(config, accelerator, source, model, settings, extractor=extractor, **context)
        trainer.train()
        trainer.outputs.finish()
    accelerator.end_training()


if __name__ == "__main__":
    main()
