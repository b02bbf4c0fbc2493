# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that a converter refuses, and what it drops: each would else give a model that samples wrongly."""

import argparse
import logging
import sys
from pathlib import Path

import pytest
import torch

from diffusers_tread.converters import convert_checkpoint


sys.path.insert(0, str(Path(__file__).parent))
from dit_formulas import random_dit  # noqa: E402


@pytest.fixture
def convert(tmp_path):
    def convert(content, source="dit", **options):
        torch.save(content, tmp_path / "checkpoint.pt")
        options = {"num_attention_heads": 4, "num_classes": 5} | options
        return convert_checkpoint(tmp_path / "checkpoint.pt", source=source, **options)

    return convert


def set_one(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize("name", ["blocks.3.mlp.fc2.weight", "y_embedder.embedding_table.weight", "pos_embed"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_one(float("nan")), "Expected finite weights, got NaN or infinity in"),
        (set_one(float("-inf")), "Expected finite weights, got NaN or infinity in"),
        (lambda tensor: (1e9 * tensor + 1e9).half(), "Expected finite weights"),
        (lambda tensor: tensor.to(torch.complex64), r"floating point, got .*complex64"),
        (lambda tensor: tensor.to(torch.int8), r"floating point, got .*int8"),
        (lambda tensor: tensor > 0, r"floating point, got .*bool"),
        (lambda tensor: tensor.to_sparse(), r"floating point, got .*sparse"),
        (lambda tensor: tensor[:0], r"floating point, got .*\[0, "),
        (lambda tensor: torch.tensor(1.0), r"floating point, got .*\[\]"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(convert, name, change, message):
    weights = random_dit()
    weights[name] = change(weights[name].clone())
    with pytest.raises(ValueError, match=message) as error:
        convert(weights)
    assert (name if name == "pos_embed" else "weight") in str(error.value)


def test_weights_in_eight_bits_are_read(convert):
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in random_dit().items() if name != "pos_embed"}
    assert convert(weights, sample_size=8).transformer.dtype == torch.float32
    weights["final_layer.linear.bias"] = torch.full((12,), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="NaN or infinity"):
        convert(weights, sample_size=8)


@pytest.mark.parametrize("index", ["7", "999999999", "00", "1" * 5000])
def test_absurd_block_numbers_are_refused_at_once(convert, index):
    weights = random_dit() | {f"blocks.{index}.attn.proj.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match="got block 999999999 among|Missing: .*unknown: "):
        convert(weights)


@pytest.mark.parametrize(("name", "shape"), [("x_embedder.proj.weight", (32, 12)), ("pos_embed", (16, 32))])
def test_shapes_of_no_dit_are_refused(convert, name, shape):
    with pytest.raises(ValueError, match=r"Expected (a patch embedding|pos_embed) of shape"):
        convert(random_dit() | {name: torch.zeros(shape)})


# The null class.


def rows(count):
    return random_dit(classes=count - 1)


@pytest.mark.parametrize("count", [1, 2, 6, 10, 100, 1000])
def test_a_table_that_may_lack_the_null_class_is_not_guessed_at(convert, count):
    with pytest.raises(ValueError, match=f"Expected num_classes .* table of {count} rows"):
        convert(rows(count), num_classes=None)


@pytest.mark.parametrize("count", [1, 10])
def test_a_table_without_the_null_class_is_refused(convert, count):
    with pytest.raises(ValueError, match="without label dropout, it has no null class"):
        convert(rows(count), num_classes=count)
    with pytest.raises(ValueError, match="Give the number of classes"):
        convert(rows(count), num_classes=count + 1)


@pytest.mark.parametrize(
    ("content", "options", "num_classes"),
    [
        (rows(6), {"num_classes": 5}, 5),
        (rows(1), {"num_classes": 0}, 0),
        (rows(1001), {"num_classes": None}, 1000),
        (rows(11), {"num_classes": None}, 10),
        ({"ema": rows(8), "args": argparse.Namespace(num_classes=7)}, {"num_classes": None}, 7),
        ({"model": rows(8), "args": {"num_classes": 7}}, {"num_classes": None}, 7),
    ],
)
def test_the_number_of_classes_is_given_or_saved_or_known(convert, content, options, num_classes):
    assert convert(content, **options).transformer.config.num_classes == num_classes


def test_saved_settings_that_contradict_the_table_are_an_error(convert):
    with pytest.raises(ValueError, match="it has no null class"):
        convert({"ema": rows(7), "args": argparse.Namespace(num_classes=7)}, num_classes=None)


# What only training uses, and whose direction it is.


HEADS = {"projectors.0.0.weight": torch.ones(4, 32), "projectors.0.4.bias": torch.ones(4)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("source", ["repa", "dit", "tread"])
def test_training_heads_are_dropped_and_named(convert, caplog, source, prefix):
    weights = {prefix + name: tensor for name, tensor in (random_dit() | HEADS).items()}
    with caplog.at_level(logging.WARNING):
        dropped = convert(weights, source).transformer.state_dict()
    assert "projectors.0.0.weight" in caplog.text
    plain = convert(random_dit(), source).transformer.state_dict()
    assert all(torch.equal(dropped[name], plain[name]) for name in plain) and dropped.keys() == plain.keys()


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (random_dit() | HEADS, "sit", "Use the source 'repa'"),
        ({"ema": random_dit(), "args": argparse.Namespace(proj_coeff=0.5)}, "sit", "Use the source 'repa'"),
        ({"ema": random_dit(), "args": argparse.Namespace(path_type="GVP")}, "sit", "linear path, got .* 'gvp'"),
        ({"ema": random_dit(), "args": argparse.Namespace(prediction="noise")}, "sit", "got .* prediction 'noise'"),
        ({"ema": random_dit(), "args": argparse.Namespace(path_type="cosine")}, "repa", "linear path, got .* 'cos"),
    ],
)
def test_a_checkpoint_that_says_it_was_trained_otherwise_is_refused(convert, content, source, message):
    with pytest.raises(ValueError, match=message):
        convert(content, source)


def test_repa_s_network_gives_the_opposite_of_sit_s_at_the_mirrored_time(convert):
    latents, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    sit, repa = (convert(random_dit(), source).transformer for source in ("sit", "repa"))
    for time in (0.0, 300.0, 1000.0):
        of_sit = sit(latents, torch.full((2,), time), class_labels=labels).sample
        of_repa = repa(latents, torch.full((2,), 1000 - time), class_labels=labels).sample
        torch.testing.assert_close(of_sit, -of_repa, atol=1e-4, rtol=1e-4)
