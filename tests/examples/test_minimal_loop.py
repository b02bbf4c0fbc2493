# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The loop that strangers copy, shortened; in full length its samples are recognised."""

import minimal_loop
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_tread import FlowMatchingObjective, TREADPipeline


def test_it_drops_labels_ends_dense_and_saves_the_averages_that_it_samples(tmp_path, monkeypatch):
    seen, averages, loss, copy_to = [], [], FlowMatchingObjective.loss, minimal_loop.EMAModel.copy_to

    def watched_loss(self, model, latents, *, class_labels, routing):
        seen.append((model.training, class_labels.max().item(), routing.enabled))
        return loss(self, model, latents, class_labels=class_labels, routing=routing)

    def watched_copy(self, parameters):
        averages.extend(one.clone() for one in self.shadow_params)
        copy_to(self, parameters)

    train = minimal_loop.train
    monkeypatch.setattr(FlowMatchingObjective, "loss", watched_loss)
    monkeypatch.setattr(minimal_loop.EMAModel, "copy_to", watched_copy)
    monkeypatch.setattr(minimal_loop, "train", lambda folder: train(folder, num_steps=40))
    minimal_loop.main(str(tmp_path / "run"))

    is_training, largest_labels, is_routed = zip(*seen, strict=True)
    assert all(is_training) and is_routed == (True,) * 34 + (False,) * 6
    assert 25 <= largest_labels.count(10)  # one of 32 labels is the null class in 97 % of the batches
    saved = TREADPipeline.from_pretrained(tmp_path / "run").transformer
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), averages, strict=True)) and not saved.training
    pixels = np.asarray(PIL.Image.open(tmp_path / "run" / "samples.png"))
    assert pixels.shape[1] > pixels.shape[0] and pixels.std() > 20


@pytest.mark.long
def test_an_svm_recognises_what_it_samples(tmp_path):
    """Of 40 samples; chance is 10 %. docs/own-loop.md has the shares of 200 for three seeds."""
    from demo import flatten, train_judge

    minimal_loop.train(str(tmp_path))
    pipeline, labels = TREADPipeline.from_pretrained(tmp_path), np.arange(40) % 10
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 20, "guidance_scale": 1.5, "generator": generator, "output_type": "np"}
    images = pipeline(labels.tolist(), **options).images[..., 0]
    assert train_judge()[0].score(flatten(np.rint(images * 255)), labels) > 0.7
