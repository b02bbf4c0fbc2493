# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import torch
from tiny_evaluation import make_pipeline

from diffusers_tread import SparseGuidance
from diffusers_tread.metrics import PipelineImages


def test_a_sample_depends_on_the_seed_and_its_index_alone():
    source = PipelineImages(make_pipeline(guider=SparseGuidance()), num_images=12, num_inference_steps=3)
    whole = source.read(0, 12)
    alone = torch.cat([source.read(index, index + 1) for index in range(12)])
    assert (whole.int() - alone.int()).abs().max() <= 1  # rounding depends on the batch
    other = PipelineImages(source.pipeline, num_images=12, num_inference_steps=3, seed=1)
    assert not torch.equal(other.read(0, 12), whole)


def test_random_labels_are_uniform_and_repeat():
    pipeline = make_pipeline()
    source = PipelineImages(pipeline, num_images=5000, num_inference_steps=1, random_labels=True)
    labels = [source.label(index) for index in range(5000)]
    counts = np.bincount(labels, minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 20  # chi-square of 4 degrees of freedom: p < 0.0005
    assert labels != [index % 5 for index in range(5000)]
    balanced = PipelineImages(pipeline, num_images=5000, num_inference_steps=1)
    assert np.bincount([balanced.label(index) for index in range(5000)]).tolist() == [1000] * 5
    again = PipelineImages(pipeline, num_images=5000, num_inference_steps=1, random_labels=True)
    assert labels == [again.label(index) for index in range(5000)]
