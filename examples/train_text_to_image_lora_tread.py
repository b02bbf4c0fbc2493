# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Trains a LoRA of a diffusers text-to-image transformer with token routing (TREAD, arXiv 2501.04765).

    accelerate launch examples/train_text_to_image_lora_tread.py --pretrained_model_name_or_path \
        stabilityai/stable-diffusion-3.5-medium --data folder:photos --resolution 512 --output_dir runs/lora

Run the same command to resume a killed run. The flags are the fields of `LoraTrainConfig`, see docs/text-to-image.md.
"""

from typing import Any

from diffusers_tread.installation import require


require("lora", "accelerate", "datasets", "psutil", "tyro", "transformers", "peft")

import torch

from diffusers_tread.distributed import on_main_process
from diffusers_tread.hooks import compile_blocks
from diffusers_tread.hub import open_repo
from diffusers_tread.runs import lora, setup, text
from diffusers_tread.runs.ema import update_ema
from diffusers_tread.runs.parsing import parse_config
from diffusers_tread.runs.trainer import TrainingLoop, open_run
from diffusers_tread.text import PromptEncoder


class Trainer(TrainingLoop):
    """The training step of a LoRA; the loop around it is shared by all training scripts."""

    def __init__(
        self, config, accelerator, source, model, settings, *, pipeline, lora_config, encoder, extractor, **context
    ):
        self.encoder, transformer = encoder, model.transformer
        kind, model_config = type(transformer), transformer.config
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if config.compile:
            compile_blocks(transformer) if config.routes != "none" else transformer.compile_repeated_blocks()
        lora.checkpoint_trained_weights_only(accelerator, transformer)
        super().__init__(config, accelerator, source, model, settings, **context)

        def make_transformer() -> torch.nn.Module:
            fresh = kind.from_config(model_config)
            fresh.add_adapter(lora_config)
            return fresh

        self.outputs = lora.LoraOutputs(
            config, accelerator, source, settings, run=self.run, weights=self.weights, names=self.names,
            pipeline=pipeline, make_transformer=make_transformer, extractor=extractor, step=self.step,
        )  # fmt: skip

    def train_step(self) -> torch.Tensor:
        accelerator, total = self.accelerator, 0.0
        for micro_step in range(self.config.gradient_accumulation_steps):
            # Batch.
            latents, conditions, routing = self.next_batch(micro_step)

            # Forward, backward and, after the last micro step, the optimiser.
            with accelerator.accumulate(self.model):
                options = {"generator": self.generator, "routing": routing, "terms": self.watching}
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

    def conditions(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return text.text_conditions(self.config, self.encoder, self.source, batch, generator)

    def null_conditions(self) -> dict[str, Any]:
        return {"text": self.encoder([""])}


def main(argv: list[str] | None = None) -> None:
    description = __doc__.split("\n")[0]
    config = parse_config(lora.LoraTrainConfig, argv, description=description)
    accelerator = setup.make_accelerator(config)
    torch.set_float32_matmul_precision(config.matmul_precision)

    # Check everything before anything is written.
    frozen_dtype = text.FROZEN_DTYPES.get(accelerator.mixed_precision, torch.float32)
    pipeline, encoded_by = text.open_pipeline(config, accelerator, transformer_dtype=frozen_dtype)
    lora_config = lora.add_lora(config, accelerator, pipeline.transformer)
    routes = text.route_transformer(config, pipeline.transformer)
    encoder = PromptEncoder(pipeline, **text.encoding_options(config))
    source, extractor = (
        text.open_data(config, encoder, encoded_by, accelerator),
        setup.open_feature_extractor(config, accelerator),
    )
    denoiser = text.make_denoiser(config, encoder, source, accelerator)
    flops, flops_saved = text.count_flops(denoiser, is_routed=bool(routes))
    settings = text.describe_run(config, accelerator, source, pipeline, encoded_by, flops_saved)
    about = text.describe_text(config, source, settings, routes)
    accelerator.print(setup.settings_table(config, accelerator, settings, about))
    if config.dry_run:
        return accelerator.end_training()
    if config.push_to_hub:  # to find a token without write access now
        on_main_process(lambda: str(open_repo(config.hub_model_id, private=config.hub_private)))

    # Train.
    fixed = {"fixed_settings": ("model", "optimizer", "rank"), "results": (lora.LORA,)}
    with open_run(config, accelerator, settings, argv, **fixed) as context:
        context |= {"pipeline": pipeline, "encoder": encoder, "extractor": extractor, "flops": flops}
        trainer = Trainer(config, accelerator, source, denoiser, settings, lora_config=lora_config, **context)
        trainer.train()
        trainer.outputs.finish()
    accelerator.end_training()


if __name__ == "__main__":
    main()
