# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""An objective in one file: the clean latents are predicted from the straight path to noise."""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

from diffusers_tread import Objective, register_objective
from diffusers_tread.objectives import CorruptedLatents


@dataclass(frozen=True, kw_only=True)
class SampleObjective(Objective):
    scheduler_advice = "DDIMScheduler with prediction_type 'sample'"

    num_train_timesteps: int = 1000
    """Number of noise levels."""

    def corrupt(self, latents, generator=None):
        scheduler = self.scheduler()
        options = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        t = torch.randint(0, self.num_train_timesteps, (len(latents),), **options).to(latents.device)  # B
        noise = torch.randn(latents.shape, **options).to(latents.device)
        noisy = scheduler.add_noise(latents.float(), noise, t)
        return CorruptedLatents(
            hidden_states=noisy.to(latents.dtype),
            timestep=t.float(),
            target=latents.float(),
            noisy=noisy,
            denoise=lambda prediction: prediction,
        )

    def scheduler(self):
        return DDIMScheduler(self.num_train_timesteps, prediction_type="sample", clip_sample=False)

    @classmethod
    def accepts(cls, scheduler):
        return scheduler.config.get("prediction_type") == "sample"


register_objective("sample", SampleObjective)
