# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The scripts under SIGTERM and beside each other, in one and two processes."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from runs import launch

from diffusers_tread.claims import FolderLock
from diffusers_tread.data.latents import encoding
from diffusers_tread.runs.checkpoints import list_checkpoints


pytest.importorskip("datasets")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import evaluate_tread  # noqa: E402
import precompute_latents  # noqa: E402
import sample  # noqa: E402
import train_tread  # noqa: E402


MODEL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}


@pytest.fixture(autouse=True)
def restored(fresh_accelerate):
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def flags(tmp_path):
    words = [
        "--model_config_name_or_path",
        json.dumps(MODEL),
        "--train_batch_size",
        "4",
        "--checkpointing_steps",
        "20",
    ]
    return [*words, "--max_train_steps", "8", "--use_ema", "--validation_steps", "4", "--output_dir"]


def train(*argv):
    AcceleratorState._reset_state(True)
    train_tread.main([*map(str, argv)])


def weights(run):
    return safetensors.torch.load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_told_to_stop_finishes_its_step_and_the_command_it_names_goes_on(
    flags, tmp_path, monkeypatch, capfd, number
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(*flags, whole)
    train_step = train_tread.Trainer.train_step

    def interrupted(trainer):
        if trainer.step == 3:  # a grid is due after this step, which may take longer than there is
            os.kill(os.getpid(), number)
        return train_step(trainer)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train_tread.Trainer, "train_step", interrupted)
        train(*flags, stopped)
    assert ended.value.code == 128 + number
    assert [path.name for path in list_checkpoints(stopped)] == ["checkpoint-4"]
    assert not (stopped / "pipeline").exists() and not (stopped / ".lock").exists()
    assert f"Saved checkpoint-4 in {stopped}. To go on: python" in capfd.readouterr().err

    train(*flags, stopped)
    ours, others = weights(whole), weights(stopped)
    assert all(torch.equal(ours[name], others[name]) for name in ours)
    assert [path.name for path in sorted((stopped / "samples").iterdir())] == [
        path.name for path in sorted((whole / "samples").iterdir())
    ]


@pytest.mark.long
def test_two_processes_of_which_one_is_told_stop_at_the_same_step_and_go_on(flags, tmp_path):
    stop = {"at": ["train_tread.Trainer.train_step"], "count": 3, "rank": 1, "send": "SIGTERM"}
    runs = [("whole", None), ("stopped", stop), ("stopped", None)]
    codes, output = launch({"argv": [*flags, tmp_path / name], "processes": 2, "kill": kill} for name, kill in runs)
    assert codes[0] == codes[2] == 0 != codes[1]
    steps = {path.name for path in list_checkpoints(tmp_path / "stopped")}
    assert steps in ({"checkpoint-3", "checkpoint-8"}, {"checkpoint-4", "checkpoint-8"}), output
    assert "To go on: accelerate launch --num_processes 2" in output
    ours, others = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.fixture
def taken(tmp_path):
    """A folder that another process is at work in."""
    child, (there, here) = None, os.pipe()
    if (child := os.fork()) == 0:
        FolderLock.take(tmp_path / "taken")
        os.write(here, b"x")
        signal.pause()
    os.read(there, 1)
    yield tmp_path / "taken"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def made(tmp_path, flags):
    """A pipeline, a VAE's folder name and images."""
    train(*flags, tmp_path / "made")
    return tmp_path / "made"


def test_a_training_in_a_folder_that_is_taken_is_refused(flags, taken):
    with pytest.raises(ValueError, match=f"Expected {taken} for this run alone, got one at work there .process"):
        train(*flags, taken)
    with pytest.raises(ValueError, match="for this run alone"):
        train(*flags, taken, "--overwrite_output_dir")
    assert [path.name for path in taken.iterdir()] == [".lock"]


@pytest.mark.parametrize("script", [sample, evaluate_tread])
def test_sampling_and_evaluation_in_a_folder_that_is_taken_are_refused(made, taken, script):
    argv = ["--pretrained_pipeline", str(made / "pipeline"), "--output_dir", str(taken), "--num_samples", "4"]
    argv += ["--num_inference_steps", "1"] + (["--reference", str(made)] if script is evaluate_tread else [])
    with pytest.raises(ValueError, match="for this run alone"):
        script.main(argv)
    assert [path.name for path in taken.iterdir()] == [".lock"]


def test_a_sampling_that_is_told_to_stop_keeps_whole_images_and_goes_on(made, tmp_path, monkeypatch, capfd):
    argv = ["--pretrained_pipeline", str(made / "pipeline"), "--num_samples", "4", "--batch_size", "1"]
    argv += ["--num_inference_steps", "1", "--output_dir", str(tmp_path / "samples")]
    drawn, draw = [], sample.draw_samples

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(5)
        return draw(*args)

    monkeypatch.setattr(sample, "draw_samples", interrupted)
    with pytest.raises(SystemExit) as ended:
        sample.main(argv)
    there = {path.relative_to(tmp_path / "samples").as_posix() for path in (tmp_path / "samples").rglob("*.*")}
    assert ended.value.code == 143 and there == {"settings.json", "images/000000.png", "images/000001.png"}
    assert "Stopped by SIGTERM; finished images are kept. To go on: python" in capfd.readouterr().err
    sample.main(argv)
    assert len(drawn) == 5 and len(list((tmp_path / "samples" / "images").iterdir())) == 4


def test_an_evaluation_that_is_told_to_stop_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate_tread, "Judges", lambda *args: None)  # which would download a network
    monkeypatch.setattr(evaluate_tread, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    argv = ["--images", str(tmp_path), "--reference", str(tmp_path), "--output_dir", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as ended:
        evaluate_tread.main(argv)
    assert ended.value.code == 143 and not (tmp_path / "results").exists()
    assert "Stopped by SIGTERM; finished batches are kept. To go on: python" in capfd.readouterr().err


@pytest.fixture
def latents_flags(tmp_path):
    """Six images and a VAE."""
    for index in range(6):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (16, 16), (index, 0, 0)).save(path)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    argv = ["--data", f"folder:{tmp_path / 'images'}", "--resolution", 16, "--cache_dir", tmp_path / "cache"]
    argv += ["--pretrained_vae_name_or_path", tmp_path / "vae", "--shard_size", 2, "--batch_size", 1, "--output_dir"]
    return [str(word) for word in argv]


def test_a_precomputation_in_a_folder_that_is_taken_is_refused(latents_flags, taken):
    with pytest.raises(ValueError, match="for this run alone"):
        precompute_latents.main([*latents_flags, str(taken)])
    assert [path.name for path in taken.iterdir()] == [".lock"]


def test_a_precomputation_that_is_told_to_stop_keeps_whole_shards_and_goes_on(
    latents_flags, tmp_path, monkeypatch, capfd
):
    encoded, encode, folder = [], encoding.encode_moments, tmp_path / "latents"

    def interrupted(*args):
        encoded.append(args)
        if len(encoded) == 4:  # in the middle of the second shard
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*args)

    monkeypatch.setattr(encoding, "encode_moments", interrupted)
    with pytest.raises(SystemExit) as ended:
        precompute_latents.main([*latents_flags, str(folder)])
    assert ended.value.code == 143 and [path.name[:11] for path in (folder / "data").iterdir()] == ["train-00000"]
    assert "Stopped by SIGTERM; finished shards are kept. To go on: python" in capfd.readouterr().err
    precompute_latents.main([*latents_flags, str(folder)])
    assert len(encoded) == 8 and len(list((folder / "data").iterdir())) == 3 and not (folder / ".lock").exists()
