# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""How the tests of this folder call a pipeline."""


def latents_of(pipe, labels, generator, **settings):
    settings = {"num_inference_steps": 3, "output_type": "latent"} | settings
    return pipe(labels, generator=generator, **settings).images
