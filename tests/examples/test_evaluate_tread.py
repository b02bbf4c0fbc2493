# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The evaluation example with a tiny pipeline and a tiny DINOv2, in one process and in several."""

import json
import os
import random
from functools import partial
from pathlib import Path

import evaluate_tread
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from runs import call, files_of, interrupting, launch
from tiny_models import make_transformer, save_extractor, save_noise, save_vae

from diffusers_tread import EDMHeunScheduler, TREADPipeline
from diffusers_tread.metrics import (
    METRICS,
    FeatureStore,
    Metric,
    load_feature_extractor,
    load_results,
    register_metric,
)
from diffusers_tread.runs.parsing import parse_config


run = partial(call, evaluate_tread)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with `pipeline` (grey, 8 x 8, four classes), `dinov2`, and `reference`: fifty images."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    TREADPipeline(make_transformer(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "pipeline")
    save_extractor(folder / "dinov2")
    save_noise(folder / "reference", 50, 8, 8)
    return folder


@pytest.fixture
def argv(material):
    """The flags of a small evaluation."""
    words = ["--reference", material / "reference", "--pretrained_pipeline", material / "pipeline"]
    words += ["--feature_extractor", f"transformers:{material / 'dinov2'}", "--batch_size", 4, "--num_samples", 30]
    words += ["--num_inference_steps", 3, "--num_kept_images", 12]
    return [str(word) for word in words]


def results_of(folder):
    (path,) = Path(folder, "results").glob("*.json")
    return load_results(path)


def stored_features(folder):
    return {name: content for name, content in files_of(Path(folder, "features")).items() if "batch-" in name}


def assert_same_evaluation(one, other):
    """The same files, bit for bit, but for what tells runs apart: date and number of processes."""
    assert stored_features(one) == stored_features(other)
    mine, theirs = (results_of(folder).to_dict() for folder in (one, other))
    for values in (mine, theirs):
        del values["date"], values["hardware"]["num_processes"]
    assert mine == theirs
    assert files_of(Path(one, "images")) == files_of(Path(other, "images"))


@pytest.mark.slow
def test_two_processes_and_killed_runs_give_what_one_process_gives(argv, tmp_path):
    """Killed alone at a random batch, then one of two processes at the same batch, then left to finish."""
    batch = random.Random(os.urandom(8)).randrange(8)
    print(f"killed at batch {batch}")
    kill = {"at": ["diffusers_tread.files.publish"], "matching": f"images/batch-{batch:06d}"}
    runs = [("one", 1, None), ("two", 2, None), ("killed", 1, kill), ("killed", 2, kill), ("killed", 1, None)]
    argv = [*argv, "--output_dir"]
    codes, _ = launch(
        {"script": "evaluate_tread", "argv": [*argv, tmp_path / name], "processes": processes, "kill": kill}
        for name, processes, kill in runs
    )
    assert codes == [0, 0, -9, -9, 0]
    assert len(stored_features(tmp_path / "one")) == 13 + 8  # of fifty and of thirty images
    for name in ("two", "killed"):
        assert_same_evaluation(tmp_path / "one", tmp_path / name)
    assert results_of(tmp_path / "two").hardware["num_processes"] == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_results_say_what_was_done(argv, material, tmp_path, capsys):
    run(*argv, "--output_dir", tmp_path, "--scheduler_config", '{"shift": 3.0}', "--guidance", "sparse",
        "--guidance_scale", 1.6, "--guider_config", '{"stop": 0.8}', "--seed", 5, "--random_labels")  # fmt: skip
    results = results_of(tmp_path)
    assert set(results.metrics) == {"fid", "precision", "recall"} and results.metrics["fid"] > 0
    images = results.images
    assert images["name_or_path"] == str(material / "pipeline") and results.num_samples == 30
    assert (images["num_inference_steps"], images["seed"], images["labels"]) == (3, 5, "random")
    assert images["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler" and images["scheduler"]["shift"] == 3.0
    guidance = {"kind": "SparseGuidance", "guidance_scale": 1.6, "strong_ratio": 0.2, "weak_ratio": 0.8, "stop": 0.8}
    assert guidance.items() <= images["guidance"].items()
    extractor = load_feature_extractor(f"transformers:{material / 'dinov2'}")
    assert results.feature_extractor == {"name": extractor.name, "fingerprint": extractor.fingerprint}
    assert (results.reference["name"], results.reference["num_images"]) == ("reference", 50)

    printed = capsys.readouterr().out
    assert f"{results.metrics['fid']:.4f}" in printed
    assert len(list((tmp_path / "images").iterdir())) == 12
    (grid,) = (tmp_path / "results").glob("*.png")
    assert PIL.Image.open(grid).size == (10 * 66, 2 * 66)


def test_a_metric_that_is_registered_is_known_to_the_flag_the_results_and_the_table(argv, tmp_path, capsys):
    def feature_mean_distance(samples, reference):
        return (samples.mean - reference.mean).norm().item()

    settings = {"takes": "statistics", "output": "features", "higher_is_better": False}
    metric = Metric(label="Distance of the means", compute=feature_mean_distance, **settings)
    register_metric("feature_mean_distance", metric)
    try:
        run(*argv, "--metrics", "feature_mean_distance,recall", "--output_dir", tmp_path,
            "--save_statistics", tmp_path / "statistics.npz")  # fmt: skip
    finally:
        del METRICS["feature_mean_distance"]
    values = results_of(tmp_path).metrics
    assert set(values) == {"feature_mean_distance", "recall"} and values["feature_mean_distance"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"feature_mean_distance {values['feature_mean_distance']:.4f} lower is better" in printed
    assert f"recall {values['recall']:.4f} higher is better" in printed
    (grid,) = (tmp_path / "results").glob("*.png")
    assert PIL.Image.open(grid).size == (8 * 66, 22 + 2 * 66)  # the classes, which take turns, above their columns


def test_a_pipeline_of_latents_runs_in_bfloat16_with_a_float32_vae(argv, tmp_path):
    vae = save_vae(tmp_path / "vae", sample_size=8)
    transformer = make_transformer(objective="edm", in_channels=4, sample_size=4)
    TREADPipeline(transformer, EDMHeunScheduler(), vae=vae).save_pretrained(tmp_path / "pipeline")
    run(*argv, "--pretrained_pipeline", tmp_path / "pipeline", "--dtype", "bfloat16", "--metrics", "fid",
        "--output_dir", tmp_path, "--scheduler", "EDMEulerScheduler")  # fmt: skip
    results = results_of(tmp_path)
    assert results.images["dtype"] == {"transformer": "bfloat16", "vae": "float32"}
    assert results.images["scheduler"]["class"] == "EDMEulerScheduler"
    assert PIL.Image.open(tmp_path / "images" / "000011.png").size == (8, 8)


def test_the_samples_written_to_a_folder_are_judged_alike(argv, material, tmp_path):
    """Also with features of the reference made before, against statistics that were saved, and as an .npz file."""
    statistics, images = tmp_path / "statistics.npz", tmp_path / "pipeline" / "images"
    shared = ["--reference_features_dir", tmp_path / "shared"]
    run(
        *argv, *shared, "--output_dir", tmp_path / "pipeline", "--num_kept_images", 30, "--save_statistics", statistics
    )
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("batch-*")}
    assert len(times) == 13
    expected = results_of(tmp_path / "pipeline").metrics

    common = [*argv[4:8], "--output_dir"]
    run("--images", images, *argv[:2], *shared, *common, tmp_path / "folder")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("batch-*")} == times
    assert results_of(tmp_path / "folder").metrics == expected
    np.savez(
        tmp_path / "images.npz", np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(images.iterdir())])
    )
    run("--images", tmp_path / "images.npz", "--reference", statistics, *common, tmp_path / "file")
    assert results_of(tmp_path / "file").metrics == {"fid": expected["fid"]}

    # Statistics alone, of a data set with a crop.
    (material / "reference").rename(tmp_path / "a class")
    try:
        run("--reference_dataset_name", tmp_path, "--resolution", 6, *common, tmp_path / "alone",
            "--save_statistics", tmp_path / "cropped.npz", "--cache_dir", tmp_path / "cache")  # fmt: skip
    finally:
        (tmp_path / "a class").rename(material / "reference")
    with np.load(tmp_path / "cropped.npz") as file:
        assert file["sigma"].shape == (16, 16)
    assert not (tmp_path / "alone" / "results").exists()


def test_a_sweep_goes_on_measures_nothing_twice_and_is_made_of_single_evaluations(argv, tmp_path, monkeypatch):
    argv = [*argv, "--metrics", "fid", "--guidance", "cfg", "--num_samples", 10, "--num_inference_steps", 3]
    grid = '{"guidance_interval": [null, [0.1, 0.7]]}'
    words = [*argv, "--guidance_scales", "2.5,1.5", "--sweep", grid, "--output_dir", tmp_path / "sweep"]
    calls, sample = [], TREADPipeline.__call__

    def counted(pipeline, class_labels, **options):
        calls.append((len(class_labels), options["guidance_scale"], options.get("guidance_interval")))
        return sample(pipeline, class_labels, **options)

    monkeypatch.setattr(TREADPipeline, "__call__", counted)
    # Stopped in the second point after its first batch.
    second = "guidance_scale-1.5-guidance_interval-0.1-0.7"
    with interrupting(FeatureStore, "write", lambda store, batch, _: second in str(store.folder) and batch == 1):
        run(*words)
    assert [row["name"] for row in json.loads((tmp_path / "sweep/sweep.json").read_text())["points"]] == [
        "guidance_scale-1.5-guidance_interval-default"
    ]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("batch-*")}
    for path in (tmp_path / "sweep/guidance_scale-1.5-guidance_interval-default/features").rglob("batch-*"):
        path.unlink()  # no longer needed
        del times[path]
    calls.clear()
    run(*words)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    # But for the first sample, which is tried, and the point that has features but no values.
    batches = {
        point: [num for num, *values in calls if tuple(values) == point] for point in {one[1:] for one in calls}
    }
    interval = (0.1, 0.7)
    assert batches.pop((1.5, None)) == [1] and batches.pop((1.5, interval)) == [1, 4, 2]
    assert batches == {(2.5, None): [1, 4, 4, 2], (2.5, interval): [1, 4, 4, 2]}

    # A run with fewer metrics than are there has those that it asks for, in its order.
    for path in (tmp_path / "sweep").glob("*/results/*.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"metrics": {"recall": 0.5} | told["metrics"]}))

    # Nothing is left to do, and the values are those of a single evaluation.
    calls.clear()
    run(*words)
    assert calls == [(1, 1.5, None)]
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [row["values"]["guidance_interval"] for row in found["points"]] == [None, "0.1,0.7"] * 2
    run(*argv, "--guidance_scale", 2.5, "--guidance_interval", "0.1,0.7", "--output_dir", tmp_path / "single")
    values = [row["metrics"]["fid"] for row in found["points"]]
    assert found["metric"] == "fid" and all(list(row["metrics"]) == ["fid"] for row in found["points"])
    assert values[-1] == results_of(tmp_path / "single").metrics["fid"] and len(set(values)) == 4
    assert found["best"] == found["points"][values.index(min(values))]["name"]
    table = (tmp_path / "sweep/sweep.md").read_text()
    assert f"{min(values):.4g} of {found['best']}" in table and "looks better than it is" in table
    assert table.count("(best)") == 1 and "10 samples, seed 0" in table
    assert PIL.Image.open(tmp_path / "sweep/sweep.png").size == (720, 480)


def test_a_list_of_points_may_compare_kinds_of_guidance(argv, material, tmp_path):
    points = [{"name": "none", "guidance": "none"}]
    points += [{"name": "sparse", "guidance": "sparse", "guidance_scale": 2, "guider_config": {"stop": 0.5}}]
    points += [{"name": "auto", "guidance": "auto", "guidance_scale": 3, "guidance_rescale": 0.5}]
    points[-1]["guidance_transformer"] = str(material)  # as a run's folder
    (tmp_path / "points.json").write_text(json.dumps(points))
    run(*argv, "--metrics", "fid", "--sweep", tmp_path / "points.json", "--output_dir", tmp_path / "sweep")
    found = {name: results_of(tmp_path / "sweep" / name) for name in ("none", "sparse", "auto")}
    guidance = {name: results.images["guidance"] for name, results in found.items()}
    assert guidance["none"]["kind"] == "none" and (guidance["sparse"]["stop"], guidance["sparse"]["weak_ratio"]) == (
        0.5,
        0.8,
    )
    assert guidance["auto"]["weak_checkpoint"] and guidance["auto"]["guidance_rescale"] == 0.5
    assert guidance["auto"]["strong_ratio"] == guidance["auto"]["weak_ratio"] == 0.0
    # The same model guides nothing.
    assert found["auto"].metrics["fid"] == pytest.approx(found["none"].metrics["fid"], rel=1e-3)
    assert found["sparse"].metrics["fid"] != found["none"].metrics["fid"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheduler", "NoSuchScheduler"], "NoSuchScheduler"),
        (["--scheduler", "EDMEulerScheduler"], "objective 'flow'"),
        (["--scheduler_config", '{"shfit": 2}'], "shfit"),
        (["--guidance_scale", "2"], "--guidance pipeline uses, got"),
        (["--guidance", "cfg"], "--guidance_scale"),
        (["--guidance", "cfg", "--guidance_scale", "2", "--weak_ratio", "0.5"], "weak_ratio"),
        (["--guidance_scales", "1,2"], "--guidance pipeline uses, got"),
        (["--guidance", "cfg", "--guidance_scales", "1,2", "--guidance_scale", "2"], "as flags or in a sweep"),
        (["--guidance", "cfg", "--guidance_scales", "1,two"], "two"),
        (["--guidance", "cfg", "--sweep", '{"guidance_scale": [1, 2], "seed": [0, 1]}'], r"got \['seed'\]"),
        (["--guidance", "sparse", "--sweep", '{"weak_ratio": [0.8, 0.1]}'], "weak_ratio > strong_ratio"),
        (["--sweep", '[{"guidance": "none"}, {"guidance": "none"}]'], "names of their own"),
        (["--sweep", '[{"name": "A"}, {"name": "a"}]'], r"own, got \['a'\]"),
        (["--sweep", '[{"name": "Features"}]'], "other names of points than 'features'"),
        (["--sweep", '{"scheduler": [null, "NoSuchScheduler"]}'], "NoSuchScheduler"),
        (["--sweep", '{"scheduler": [null, "EDMHeunScheduler"]}'], "a scheduler for models that FlowMatchEuler"),
        (["--sweep", '{"scheduler_config": [null, {"shfit": 2}]}'], "shfit"),
        (["--sweep", '{"guidance": ["none", "sprase"]}'], r"--guidance as Literal\['pipeline', .* got 'sprase'"),
        (["--sweep", '{"num_inference_steps": [3, true]}'], "num_inference_steps as 'int', .* got True"),
        (["--guidance", "cfg", "--sweep", '{"guidance_scale": [2, NaN]}'], "numbers finite, got nan"),
        (["--guidance", "cfg", "--guidance_scale", "nan"], "numbers finite, got nan"),
        (
            ["--guidance", "cfg", "--guidance_scales", "2", "--sweep", '{"guidance_scale": [3]}'],
            "in --sweep, got both",
        ),
        (["--guidance_interval", "0.1,0.7"], "only with a guider or a guidance_scale"),
        (["--guidance", "cfg", "--guidance_scales", "1.5,2", "--guidance_interval", "20,80"], "to 1 in 3 calls"),
        (["--guidance", "cfg", "--guidance_scale", "2", "--guidance_interval", "0.7,0.1"], "0 <= low < high"),
        (["--guidance", "auto"], "second denoiser"),
        (["--guidance", "sparse", "--guider_config", '{"ratio": 0.5}'], "ratio"),
        (["--guidance", "sparse", "--weak_ratio", "0.1"], "weak_ratio"),
        (["--num_samples", "1"], "at least"),
        (["--num_inference_steps", "0"], "num_inference_steps"),
        (["--metrics", "sfid"], "'spatial' for sfid"),
        (["--metrics", "fid,ifd"], "'ifd'"),
        (["--images", "somewhere"], "--pretrained_pipeline or --images"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--reference_dataset_name", "some/where"], "either --reference or"),
        (["--resolution", "6"], r"samples' size \(8, 8\), got \(6, 6\)"),
        (["--feature_extractor", "perception"], "perception"),
        (["--feature_extractor_weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--pretrained_pipeline", "nowhere"], "nowhere"),
        (["--save_statistics", "a.npz", "--metrics", "recall"], "sfid.* in --metrics"),
        (["--reference", "a.npz", "--resolution", "8"], "nothing else is cropped"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(argv, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*argv, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_flags_that_nothing_would_use_are_refused():
    with pytest.raises(ValueError, match=r"\['seed', 'scheduler'\] only with --pretrained_pipeline"):
        run(*"--images a --reference b --seed 3 --scheduler EDMEulerScheduler".split())


def test_a_config_gives_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"reference": "a.npz", "images": "b", "metrics": "fid,recall", "batch_size": 3})
    )
    flags = ["--config", str(tmp_path / "config.json"), "--batch_size", "4"]
    config = parse_config(evaluate_tread.EvaluationConfig, flags)
    assert (config.reference, config.images, config.batch_size) == ("a.npz", "b", 4)
    assert config.metric_names == ["fid", "recall"]
