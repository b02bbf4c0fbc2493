# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Flags with which a script cannot work are refused before it measures anything."""

import importlib

import pytest


WANTED = {"guidance_digits": ["sklearn"], "read_latents": ["datasets", "lmdb"], "training_loop": ["datasets"]}
# By script: flags, and what the message says of them.
REFUSED = {
    "guidance_digits": {
        "--weak_steps 2500": "--weak_steps in", "--num_images 15": "divisible by the 10 classes",
        "--num_images 1350": "1340", "--seeds 1": "--seeds >= 2",
    },
    "hooks_overhead": {
        "--tokens 10": "square number", "--width 100": "multiple of 64", "--repeats 1": "--repeats >= 2",
        "--warmup -1": "--warmup >= 0", "--threads 0": "--threads >= 1",
    },
    "memory": {
        "--batch_sizes 2": "two --batch_sizes", "--check_batch_size 4": "not among", "--tokens 10": "square number",
        "--device meta": "cpu or cuda", "--search": "--device cuda", "--budget_gib 0": "--budget_gib > 0",
    },
    "profile_step": {"--tokens 5": "--tokens", "--batch_size 0": "--batch_size", "--repeats 1": "--repeats"},
    "read_latents": {
        "--formats arrow,hdf5": "--formats", "--repeats 1": "repeats", "--num_samples 64 --batch_size 128": "128"
    },
    "roofline": {
        "--tokens 5": "--tokens", "--batch_size 0": "--batch_size", "--selection_ratio 1": "--selection_ratio",
        "--matmul_tflops 0": "--matmul_tflops", "--bandwidth_tbs -1": "--bandwidth_tbs",
    },
    "routing_overhead": {
        "--shapes 8": "--shapes", "--shapes 0x256": "--shapes", "--shapes 8xmany": "--shapes",
        "--selection_ratio 0": "--selection_ratio",
    },
    "sampling": {
        "--tokens 200": "--tokens", "--tokens -4": "--tokens", "--repeats 1": "--repeats",
        "--batch_size 0": "--batch_size", "--num_inference_steps 0": "--num_inference_steps",
        "--compile": "--warmup >= 1", "--preset M/2": "Expected a preset",
    },
    "scaling": {
        "--schemes ddp,zero": "--schemes", "--overlap 1.5": "--overlap", "--keep 0": "--keep",
        "--tokens 5": "--tokens", "--routed_ms 10": "--dense_ms", "--storage_gbps 0": "--storage_gbps",
        "--inter_node_gbps 0": "--inter_node",
        "--dense_ms 10 --routed_ms 10": "fixed part", "--gpus 12": "whole nodes",
    },
    "scan_cost": {"--repeats 1": "--repeats >= 2"},
    "startup": {"--first_steps 1": "--first_steps", "--repeats 1": "--repeats"},
    "train_step": {
        "--tokens 200": "--tokens", "--modes fast": "--modes", "--repeats 1": "--repeats",
        "--batch_size 0": "--batch_size", "--tokens 4,16,64 --batch_size 4,2": "--batch_size",
        "--presets M/2": "Expected a preset",
    },
    "training_loop": {
        "--tokens 200": "--tokens", "--repeats 1": "--repeats", "--batch_size 0": "--batch_size",
        "--steps_per_turn 0": "--steps_per_turn", "--preset M/2": "Expected a preset",
    },
}  # fmt: skip


@pytest.mark.parametrize(("script", "flags"), [(script, flags) for script in REFUSED for flags in REFUSED[script]])
def test_impossible_flags_are_refused(script, flags, fresh_accelerate):
    for package in WANTED.get(script, []):
        pytest.importorskip(package)
    with pytest.raises(ValueError, match=REFUSED[script][flags]):
        importlib.import_module(script).main(flags.split())
