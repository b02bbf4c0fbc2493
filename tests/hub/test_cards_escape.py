# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Names that would be HTML, or end a cell, a line or a piece of code, are text in a card."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from diffusers_tread import SparseGuidance
from diffusers_tread.data.latents import LatentsInfo
from diffusers_tread.data.latents.card import latents_card
from diffusers_tread.hub import CardDetails, model_card
from diffusers_tread.metrics import EvaluationResults


sys.path.insert(0, str(Path(__file__).parent))
from tiny_pipeline import make_pipeline  # noqa: E402


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "a\n\n# Heading\n| x | y |",
    "a\r\n</td></table>",
    "`code` **bold** [link](javascript:alert(1))",
    '") ; import os ; ("',
    "&lt;b&gt;",
    "<!-- hidden -->",
]


def cells(text):
    """How many cells the rows of a card's tables have."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.replace("\\|", "").count("|") - 1 for line in rows]


def check(text, plain):
    """A card of hostile names has the form of one of plain names."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # blocks of code are text
    for tag in ("<script", "<img", "</td", "<!--", "[link](", "`code`"):
        assert tag not in prose
    assert cells(text) == cells(plain)
    for mark in ("#", "```"):
        assert [line.startswith(mark) for line in text.splitlines()] == [
            line.startswith(mark) for line in plain.splitlines()
        ]


@pytest.fixture(scope="module")
def pipeline():
    """With a guider of constant ratios: each other one of a sampling is a count of FLOPs, in every card."""
    pipeline = make_pipeline()
    pipeline.guider = SparseGuidance(strong_ratio=0.3, weak_ratio=0.8)
    return pipeline


@pytest.mark.parametrize("name", HOSTILE)
def test_the_card_of_a_pipeline(pipeline, name):
    def card(name):
        pipeline.register_to_config(id2label={"0": name})
        results = EvaluationResults(
            metrics={"fid": 1.0, name: 2.0},
            num_samples=2,
            images={"scheduler": {"class": name}, "guidance": {"kind": name}},
            feature_extractor={"name": name},
            reference={"name": name},
            batch_size=1,
        )
        training = {"objective": name, "lr_scheduler": name}
        details = CardDetails(license=name, dataset=name, training=training, results=[results])
        return model_card(pipeline, repo_id=name.replace("/", "-"), details=details).text

    check(card(name), card("plain"))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_card_of_latents(name):
    def card(name):
        info = {field.name: 1 for field in dataclasses.fields(LatentsInfo)} | {"patch_features": None}
        info |= {"kind": "moments", "dtype": "float32", "shape": (4, 8, 8), "shards": (), "unreadable": ()}
        info |= {
            "latents_mean": None,
            "latents_std": None,
            "captions": (),
            "text": None,
            "latent_sizes": (),
            "sizes": (),
        }
        info |= {"id2label": {0: name}, "source": {"name": name}, "crop": name}
        info["vae"] = {key: name for key in ("name_or_path", "class_name", "dtype", "revision")}
        fake = type("Info", (), info)()
        return latents_card(fake, repo_id=name.replace("/", "-")).text

    check(card(name), card("plain"))
