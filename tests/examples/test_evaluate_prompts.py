# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The evaluation and the sampling example on prompts, with a tiny SD3, a tiny DINOv2 and a tiny CLIP."""

import csv
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import evaluate_tread
import numpy as np
import PIL.Image
import pytest
import sample
import torch
from diffusers import StableDiffusion3Pipeline
from runs import call, files_of, interrupting, launch
from tiny_models import save_extractor, save_noise

from diffusers_tread import GuidedPipeline, SparseGuidance, TokenRoute, apply_token_routing
from diffusers_tread.metrics import SCORERS, FeatureStore, PromptImages, load_results


pytest.importorskip("transformers")
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("hooks", "metrics")]

from tiny_clip import save_clip  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402


run = partial(call, evaluate_tread)
PROMPTS = ["a red square", "blue", "a blue red square", "square, red"]
SCORER = """
from diffusers_tread.metrics import register_scorer

def redness(images, prompts):
    return (images[:, 0].float() - images[:, 2].float()).mean(dim=(1, 2))

register_scorer("redness", redness)
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with `pipeline` (an SD3 of 16 pixels), `dinov2`, `clip`, `reference`, `prompts.txt` and `scorer.py`."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    PIPELINES["sd3"](folder / "tokenizers").save_pretrained(folder / "pipeline")
    save_extractor(folder / "dinov2")
    save_clip(folder / "clip")
    save_noise(folder / "reference", 20, 16, 16)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "scorer.py").write_text(SCORER)
    return folder


@pytest.fixture(autouse=True)
def no_new_scorers(monkeypatch):
    monkeypatch.setattr("diffusers_tread.metrics.scorers.from_file._LOADED", {})
    for name in set(SCORERS) - {"clip"}:
        monkeypatch.delitem(SCORERS, name)
    yield
    for name in set(SCORERS) - {"clip"}:
        del SCORERS[name]


@pytest.fixture
def sampling(material):
    """The flags of samples, for both examples."""
    words = ["--pretrained_pipeline", material / "pipeline", "--prompts", material / "prompts.txt"]
    words += ["--height", 16, "--width", 16, "--num_inference_steps", 2, "--num_samples", 10, "--batch_size", 3]
    words += ["--call_options", '{"max_sequence_length": 4}', "--guidance", "cfg", "--guidance_scale", 2]
    return [str(word) for word in words]


@pytest.fixture
def argv(material, sampling):
    """The flags of a small evaluation, with a reference and two scorers."""
    words = ["--scorers", "clip,redness", "--clip_model", material / "clip", "--scorer_file", material / "scorer.py"]
    words += ["--reference", material / "reference", "--feature_extractor", f"transformers:{material / 'dinov2'}"]
    return [*sampling, *map(str, words), "--num_kept_images", "10"]


def results_of(folder):
    (path,) = Path(folder, "results").glob("*.json")
    return load_results(path)


def assert_same_evaluation(one, other):
    """The same features, scores and images, bit for bit, and the same values."""
    for name in ("features", "images"):
        assert files_of(one / name) == files_of(other / name)
    assert (one / "results" / "scores.csv").read_bytes() == (other / "results" / "scores.csv").read_bytes()
    assert results_of(one).metrics == results_of(other).metrics


def test_prompts_give_fid_scores_a_table_and_a_grid(argv, tmp_path, capsys, caplog):
    run(*argv, "--output_dir", tmp_path)
    results = results_of(tmp_path)
    names = {"clip_score", "clip_score_standard_error", "redness_score", "redness_score_standard_error"}
    assert set(results.metrics) == {"fid", "precision", "recall"} | names and results.metrics["fid"] > 0
    assert "10 samples of 4 prompts" in caplog.text
    assert results.images["prompts"]["num_prompts"] == 4 and results.images["guidance_scale"] == 2.0
    assert results.images["call_options"] == {"max_sequence_length": 4} and results.num_samples == 10
    assert set(results.scorers) == {"clip", "redness"} and "fingerprint" in results.scorers["clip"]
    assert len(results.scorers["redness"]["file_sha256"]) == 64

    # A row per image, which is what the kept files show.
    with open(tmp_path / "results" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == (PROMPTS * 3)[:10]
    images = np.stack([np.array(PIL.Image.open(tmp_path / f"images/{i:06d}.png"), dtype=float) for i in range(10)])
    redness = (images[..., 0] - images[..., 2]).mean(axis=(1, 2))
    np.testing.assert_allclose([float(row["redness_score"]) for row in rows], redness, rtol=1e-4, atol=1e-4)
    assert results.metrics["redness_score"] == pytest.approx(redness.mean(), rel=1e-4)
    (grid,) = (tmp_path / "results").glob("*.png")
    assert PIL.Image.open(grid).width == 5 * 162
    printed = " ".join(capsys.readouterr().out.split())
    assert f"clip_score {results.metrics['clip_score']:.4f} higher is better" in printed


def test_an_interrupted_evaluation_goes_on_and_other_scorers_are_refused(argv, material, tmp_path):
    run(*argv, "--output_dir", tmp_path / "whole")
    words = [*argv, "--output_dir", tmp_path / "stopped"]
    with interrupting(FeatureStore, "write", lambda store, batch, features: "clip_score" in features and batch == 1):
        run(*words)
    assert len(files_of(tmp_path / "stopped" / "features" / "images")) == 2  # settings and a batch
    run(*words)
    assert_same_evaluation(tmp_path / "whole", tmp_path / "stopped")

    # Another code of the same name, in another process.
    del SCORERS["redness"]
    (material / "other.py").write_text(SCORER + "# changed\n")
    with pytest.raises(ValueError, match="file_sha256"):
        run(*words, "--scorer_file", material / "other.py")


@pytest.mark.long
def test_two_processes_go_on_after_a_kill_and_give_what_one_process_gives(argv, tmp_path):
    kill = {"at": ["diffusers_tread.files.publish"], "matching": "features/images/batch-000001"}
    runs = [("one", 1, None), ("other", 1, kill), ("other", 2, None)]
    plan = [{"argv": [*argv, "--output_dir", tmp_path / name], "processes": n, "kill": kill} for name, n, kill in runs]
    codes, _ = launch({"script": "evaluate_tread", **entry} for entry in plan)
    assert codes == [0, -9, 0]
    assert_same_evaluation(tmp_path / "one", tmp_path / "other")
    assert results_of(tmp_path / "other").hardware["num_processes"] == 2


def test_scores_alone_need_no_reference_and_sample_shows_the_same_images(sampling, material, tmp_path):
    run(*sampling, "--scorers", "clip", "--clip_model", material / "clip", "--output_dir", tmp_path / "scores")
    results = json.loads((tmp_path / "scores" / "results" / "scores.json").read_text())
    assert set(results["metrics"]) == {"clip_score", "clip_score_standard_error"}
    assert results["reference"] == results["feature_extractor"] == {"name": "none"}
    call(sample, *sampling, "--output_dir", tmp_path / "samples")
    assert files_of(tmp_path / "samples" / "images") == files_of(tmp_path / "scores" / "images")
    assert PIL.Image.open(tmp_path / "samples" / "prompts-000000.png").width == 10 * 162


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompt_dataset_name", "some/where"], "--prompts or --prompt_dataset_name"),
        (["--random_labels"], "without --random_labels"),
        (["--call_options", '{"negative": ""}'], "'negative'"),
        (["--scheduler", "EDMHeunScheduler"], "FlowMatchEulerDiscreteScheduler samples from"),
        (["--scorers", "blip"], "'blip'"),
        (["--scorer_file", "nowhere.py"], "nowhere.py"),
        (["--clip_model", "nowhere"], "nowhere"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--reference_dataset_name", "some/where"], "either --reference"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(argv, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*argv, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--pretrained_pipeline a --reference b --scorers clip", "with --prompts"),
        ("--pretrained_pipeline a --prompts c --scorer_file d.py --reference b", "no --scorer_file alone"),
        ("--pretrained_pipeline a --prompts c", "or --scorers, got both or none"),
        ("--pretrained_pipeline a --prompts c --scorers clip --metrics fid", "scorers alone"),
        ("--pretrained_pipeline a --reference b --caption_column c", r"\['caption_column'\] only with --prompts"),
        ("--images a --reference b --prompts c", r"\['prompts'\] only with --pretrained_pipeline"),
    ],
)
def test_flags_that_nothing_would_use_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        run(*argv.split())


def test_sparse_guidance_takes_the_routes_and_the_options_of_the_run(sampling, material, tmp_path, caplog):
    """The SD3 as a run leaves it, against the routes as a flag, and against `GuidedPipeline` itself."""
    words = sampling[: sampling.index("--call_options")] + ["--num_samples", "2", "--guidance", "sparse"]
    guidance = ["--guidance_scale", "1.6", "--strong_ratio", "0", "--weak_ratio", "0.75"]
    with pytest.raises(ValueError, match="Expected --routes, those that the pipeline was trained with"):
        call(sample, *words, *guidance, "--output_dir", tmp_path / "none")

    shutil.copytree(material / "pipeline", tmp_path / "run/pipeline")
    settings = {"routes": "default", "call_options": "{}", "max_sequence_length": 4}
    (tmp_path / "run/train_config.json").write_text(json.dumps(settings))
    flags = {
        "run": ["--pretrained_pipeline", tmp_path / "run/pipeline"],
        "flag": ["--routes", '[{"start": 2, "end": -4}]', "--call_options", '{"max_sequence_length": 4}'],
        "interval": ["--pretrained_pipeline", tmp_path / "run/pipeline", "--guidance_interval", "0.9,1"],
        "off": ["--pretrained_pipeline", tmp_path / "run/pipeline", "--guider_config", '{"enabled": false}'],
    }
    for name, more in flags.items():
        call(sample, *words, *guidance, *more, "--output_dir", tmp_path / name)
    assert "Called with {'max_sequence_length': 4}, as in training" in caplog.text
    images = {name: files_of(tmp_path / name / "images") for name in flags}
    assert images["run"] == images["flag"] and len({str(one) for one in images.values()}) == 3
    assert json.loads((tmp_path / "run/settings.json").read_text())["routes"][0]["start"] == 2

    pipeline = StableDiffusion3Pipeline.from_pretrained(material / "pipeline")
    apply_token_routing(pipeline.transformer, TokenRoute(start=2, end=-4))
    guided = GuidedPipeline(pipeline, SparseGuidance(guidance_scale=1.6, strong_ratio=0.0, weak_ratio=0.75))
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "call_options": {"max_sequence_length": 4}}
    expected = PromptImages(guided, PROMPTS, **options).read(0, 2)
    for index, image in enumerate(expected.permute(0, 2, 3, 1).numpy()):
        np.testing.assert_array_equal(np.array(PIL.Image.open(tmp_path / f"run/images/{index:06d}.png")), image)


def test_neither_pickles_nor_code_of_a_pipeline_are_read(sampling, material, tmp_path):
    shutil.copytree(material / "pipeline", tmp_path / "pickled")
    weights = tmp_path / "pickled" / "text_encoder_3" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    for name, key, place in [("coded", "_class_name", ""), ("coded part", "vae", "vae")]:
        shutil.copytree(material / "pipeline", tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text()) | {key: ["mine", "Mine"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        code = f"open({str(tmp_path / 'executed')!r}, 'w')"
        (tmp_path / name / place / "mine.py").write_text(code)
    flags = ["--scorers", "clip", "--clip_model", material / "clip", "--output_dir", tmp_path / "out"]
    for name, message in {"pickled": "safetensors", "coded": "code of its own", "coded part": "vae/mine.py"}.items():
        with pytest.raises(ValueError, match=message):
            run(*sampling, *flags, "--pretrained_pipeline", tmp_path / name)
    assert not (tmp_path / "executed").exists()
