# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/guidance_digits.py, trained far too shortly to guide anything, and the guide's table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image


pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
import guidance_digits  # noqa: E402


ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "guidance_digits.json"


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guidance_digits.demo, "NUM_INFERENCE_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_steps):
    """The report of a tiny run, the flags and the folder."""
    folder = tmp_path_factory.mktemp("guidance")
    flags = ["--max_train_steps", "3", "--weak_steps", "2", "--num_images", "10", "--seeds", "2"]
    flags += ["--output_dir", str(folder / "run"), "--output", str(folder / "report.json")]
    return guidance_digits.main([*flags, "--plot", str(folder / "plot.png")]), flags, folder


@pytest.fixture(scope="module")
def judge():
    return guidance_digits.Judge()


def test_it_writes_what_it_measured(run):
    report, _, folder = run
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    real, unguided, *guided = report["rows"]
    assert (real["kind"], unguided["kind"]) == (guidance_digits.REAL, guidance_digits.UNGUIDED)
    assert list(dict.fromkeys(row["kind"] for row in guided)) == list(guidance_digits.KINDS)
    for row in report["rows"]:
        assert all(len(row[name]) == 2 for name in guidance_digits.METRICS)
    assert all(0.99 > row["share_of_cfg"] > 0.4 for row in guided if row["kind"] not in ("CFG", "AG"))
    assert [row["share_of_cfg"] for row in (unguided, guided[0])] == [0.5, 1.0]
    assert Image.open(folder / "plot.png").size == (1600, 850)


def test_each_kind_and_seed_makes_samples_of_its_own_whatever_the_number_of_workers(run, tmp_path):
    _, flags, _ = run
    args = guidance_digits.parse_args([*flags, "--workers", "2"])
    pipeline = guidance_digits.load_pipeline(args)
    args.output_dir = tmp_path
    generator = torch.Generator().manual_seed(0)
    for model, folder in ((pipeline.transformer, "pipeline"), (pipeline.guidance_transformer, "checkpoint-2")):
        for parameter in model.parameters():  # so short a training leaves outputs of zero
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        (tmp_path / folder).mkdir()
    safetensors.torch.save_file(pipeline.guidance_transformer.state_dict(), tmp_path / "checkpoint-2/ema.safetensors")
    pipeline.guidance_transformer = None
    pipeline.save_pretrained(tmp_path / "pipeline")

    guiders = [None, *(make(guidance_scale=1.5) for make, _ in guidance_digits.KINDS.values())]
    sets = np.array(guidance_digits.sample_all(args, guiders)).reshape(2 * len(guiders), -1)
    assert len(np.unique(sets, axis=0)) == len(sets)

    shutil.rmtree(tmp_path / "sets")
    args.workers = 1
    again = np.array(guidance_digits.sample_all(args, guiders[2:4])).reshape(4, -1)
    np.testing.assert_array_equal(again, sets[4:8])


def test_the_weak_model_is_the_early_one_and_the_model_never_saw_the_held_out_digits(run, judge):
    _, flags, folder = run
    pipeline = guidance_digits.load_pipeline(guidance_digits.parse_args(flags))
    strong, weak = pipeline.transformer.state_dict(), pipeline.guidance_transformer.state_dict()
    assert any(not np.array_equal(strong[name], weak[name]) for name in strong)

    seen = guidance_digits.SeenDigits()
    assert len(seen) + len(judge.held_out) == 1797
    assert json.loads((folder / "run" / "train_config.json").read_text())["num_images"] == len(seen)
    pixels = np.rint((seen.images.numpy().reshape(len(seen), -1) + 1) * 127.5) / 255
    np.testing.assert_allclose(np.sort(pixels, axis=0), np.sort(judge.seen, axis=0), atol=1e-6)


def test_the_features_are_what_the_network_decides_by(judge):
    features = judge.features(judge.held_out)
    assert features.shape == (len(judge.held_out), 32)
    scores = features @ judge.network.coefs_[-1] + judge.network.intercepts_[-1]
    np.testing.assert_array_equal(judge.network.classes_[scores.argmax(axis=1)], judge.network.predict(judge.held_out))
    assert judge.network.score(judge.held_out, judge.held_out_labels) > 0.9


def test_the_distances_tell_noise_from_digits(judge):
    noise = np.random.default_rng(0).random((450, 64))
    for of_noise, of_digits in judge.distances([noise, judge.seen[:450]]).values():
        assert of_noise > 10 * of_digits > 0


def test_the_guide_s_table_and_what_it_says_of_it_are_those_of_the_committed_result():
    guide, report = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8"), json.loads(RESULT.read_text())
    assert guidance_digits.table(report) in guide
    assert list(dict.fromkeys(row["kind"] for row in report["rows"][2:])) == list(guidance_digits.KINDS)
    assert (report["settings"]["num_images"], report["settings"]["seeds"]) == (500, 3)

    # Against no guidance, seed by seed, because every row starts from the same noise: mean change per metric.
    def changes(kind, scale, *, to=(guidance_digits.UNGUIDED, None)):
        rows = {(row["kind"], row["guidance_scale"]): row for row in report["rows"]}
        return [np.array(rows[kind, scale][name]) - rows[to][name] for name in guidance_digits.METRICS]

    _, unguided, *guided = report["rows"]
    for row in guided:
        accuracy, pixels, features = changes(row["kind"], row["guidance_scale"])
        if row["kind"].startswith("SG"):
            assert ((accuracy >= 0.002) & (accuracy < 0.0101)).all()
            assert abs(pixels).max() < 0.003 and abs(features).max() < 0.05
        elif (row["kind"], row["guidance_scale"]) == ("AG", 1.1):
            assert (pixels < 0).all() and abs(pixels.mean() / np.mean(unguided["pixel_distance"]) + 0.02) < 0.005
            assert abs(features.mean() / np.mean(unguided["feature_distance"]) - 0.02) < 0.01
        else:
            assert (accuracy > 0).all() and (pixels > 0).all() and (features > 0).all()

    accuracy = {row["kind"]: row["accuracy"] for row in guided}  # of several scales the largest
    middle = accuracy["CFG, middle half of the steps"]
    assert all(np.less(accuracy[kind], accuracy["CFG"]).all() for kind in accuracy if "CFG" not in kind)
    assert np.mean(middle) < np.mean(accuracy["CFG"]) and np.greater(middle, unguided["accuracy"]).all()
    for kind, to in (
        ("CFG + SG, ratios 0.2/0.8", "CFG"),
        ("AG + SG, ratios 0/0.75", "AG"),
        ("AG + SG, the preset fid", "AG"),
    ):
        of_accuracy, of_pixels, of_features = changes(kind, 1.5, to=(to, 1.5))
        assert abs(of_accuracy).max() < 0.0065 and abs(of_pixels).max() < 0.005 and abs(of_features).max() < 0.15
