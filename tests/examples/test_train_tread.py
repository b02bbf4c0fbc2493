# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import ast
import copy
import dataclasses
import json
import math
import os
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import train_tread
from accelerate import Accelerator
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from runs import assert_bitwise_equal, call, interrupting, launch, weights_of
from tiny_models import SIZE, cut_off, save_noise, save_vae
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_tread import (
    EDMHeunScheduler,
    PathDropGuidance,
    SparseGuidance,
    TokenRouter,
    TREADPipeline,
    TREADTransformer2DModel,
)
from diffusers_tread.flops import training_flops
from diffusers_tread.objectives import base
from diffusers_tread.runs import samples, setup, trainer
from diffusers_tread.runs.checkpoints import list_checkpoints, verify_checkpoint
from diffusers_tread.runs.config import CONTROL_FIELDS, TrainConfig
from diffusers_tread.runs.presets import RECIPES


datasets = pytest.importorskip("datasets")
train = partial(call, train_tread)
RECONSTRUCTION = ["--loss_terms", '{"reconstruction": {"weight": 0.1}}']
PIXELS = json.dumps(SIZE | {"patch_size": 1})
ROUTES = [{"start": 1, "end": 2, "selection_ratio": 0.5}]
TINY = {
    "model_config_name_or_path": {**SIZE, "patch_size": 2, "routes": ROUTES},
    "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 10, "checkpointing_steps": 3,
    "learning_rate": 0.01, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "use_ema": True, "ema_decay": 0.9,
    "logging_steps": 2, "class_dropout_prob": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def restored(fresh_accelerate, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def config(tmp_path):
    """Writes a tiny config with changes and gives its path."""

    def write(**changes):
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.json"
        path.write_text(json.dumps(TINY | changes))
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path):
    """Two classes of four 20x24 noise images each, the last file cut off."""
    for label, name in enumerate(("ant", "bee")):
        save_noise(tmp_path / "images" / name, 4, 20, 24, seed=label)
    cut_off(tmp_path / "images" / "bee" / "03.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_like_one_that_was_not_killed(config, tmp_path):
    """Killed at a random step, then with a checkpoint on the disk but not published, then left to finish.

    With four processes, because the rounding of a sum over more than two depends on how DDP groups the gradients.
    """
    step, path, plan = random.Random(os.urandom(8)).randrange(4, 9), config(), []
    print(f"killed in step {step}")
    in_step = {"at": ["train_tread.Trainer.next_batch"], "count": 2 * step + 2}  # the second batch of the step
    sealed = {"at": ["diffusers_tread.runs.checkpoints.replace_folder"], "matching": "checkpoint-9"}
    for processes in (1, 4):
        whole, killed = (
            ["--config", path, "--output_dir", tmp_path / f"{name}-{processes}"] for name in ("whole", "killed")
        )
        plan.append({"argv": whole, "processes": processes})
        for kill in (in_step, sealed, None):
            plan.append({"argv": killed, "processes": processes, "kill": kill})
    codes, _ = launch(plan)
    assert codes == [0, -9, -9, 0] * 2
    for processes in (1, 4):
        whole, killed = tmp_path / f"whole-{processes}", tmp_path / f"killed-{processes}"
        assert [folder.name for folder in list_checkpoints(killed)] == [f"checkpoint-{at}" for at in (3, 6, 9, 10)]
        assert not list(killed.glob("*.tmp"))
        assert len(weights_of(killed)) == 3
        assert_bitwise_equal(whole, killed)
        assert json.loads((killed / "train_config.json").read_text())["num_processes"] == processes


def test_a_run_on_latents_of_damaged_images_ends_in_an_edm_pipeline_with_its_vae(config, folder, tmp_path):
    save_vae(tmp_path / "vae", shift_factor=0.1)
    output, tracker = tmp_path / "run", "tensorboard" if find_spec("tensorboard") else "none"
    train(
        *("--config", config(objective="edm", max_train_steps=4), "--output_dir", output, "--random_flip"),
        *("--data", f"folder:{folder}", "--resolution", 16, "--pretrained_vae_name_or_path", tmp_path / "vae"),
        *("--validation_steps", 4, "--num_validation_images", 3, "--validation_inference_steps", 2),
        *("--report_to", tracker, "--gradient_checkpointing", "--objective_config", '{"P_mean": -1.0}'),
    )
    pipeline = TREADPipeline.from_pretrained(output / "pipeline")
    assert isinstance(pipeline.scheduler, EDMHeunScheduler) and pipeline.config.id2label == {"0": "ant", "1": "bee"}
    assert (pipeline.transformer.config.sample_size, pipeline.transformer.config.in_channels) == (8, 4)
    images = pipeline(["bee"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()

    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert [name.split(" (")[0][-10:] for name in state["corrupt_images"]] == ["bee/03.png"]
    assert state["samples_seen"] == 24
    assert PIL.Image.open(output / "samples" / "step-0000004.png").size == (3 * 66, 22 + 66)
    assert bool(list(output.rglob("events*"))) == (tracker == "tensorboard")


def test_samples_are_drawn_in_the_precision_of_training_and_weights_stay_float32(config, tmp_path, monkeypatch):
    seen, make_denoiser = [], setup.make_denoiser

    def watch(*args, **kwargs):
        model = make_denoiser(*args, **kwargs)
        model.proj_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return model

    for module in (setup, samples):
        monkeypatch.setattr(module, "make_denoiser", watch)
    train("--config", config(max_train_steps=3), "--output_dir", tmp_path / "run", "--mixed_precision", "bf16",
          "--validation_steps", 2, "--num_validation_images", 2, "--validation_inference_steps", 1)  # fmt: skip
    assert seen == [torch.bfloat16] * 8  # two steps of two micro-steps, a grid, another step, a grid
    assert {weight.dtype for weights in weights_of(tmp_path / "run") for weight in weights.values()} == {torch.float32}


def test_the_pipeline_holds_the_average_and_a_clean_config(config, tmp_path):
    train("--config", config(), "--output_dir", tmp_path / "run")
    model, ema, pipeline = weights_of(tmp_path / "run")
    assert all(torch.equal(ema[name], pipeline[name]) for name in ema)
    assert not all(torch.equal(model[name], pipeline[name]) for name in ema)
    loaded = TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    saved = json.loads((tmp_path / "run" / "pipeline" / "transformer" / "config.json").read_text())
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert {key for key in saved if key[0] != "_"} == set(settings["model"])
    assert saved["routes"] == ROUTES and saved["objective"] == "flow"
    with pytest.raises(ValueError):
        TREADPipeline(loaded.transformer, EDMEulerScheduler())


def test_a_streamed_run_goes_on_exactly(config, folder, tmp_path):
    argv = ["--config", config(checkpointing_steps=4), "--data", f"folder:{folder}", "--resolution", 8]
    argv += ["--streaming", "--shuffle_buffer", 4, "--random_flip", "--output_dir"]
    train(*argv, tmp_path / "whole")
    with interrupting(train_tread.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 6):
        train(*argv, tmp_path / "stopped")
    train(*argv, tmp_path / "stopped", "--dataloader_num_workers", 2)
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")


def test_routing_is_on_until_the_dense_share_and_its_seeds_differ(config, tmp_path, monkeypatch):
    seen = []
    train_step = train_tread.Trainer.train_step

    def watch(trainer):
        loss = train_step(trainer)
        seen.append((*routings.pop(), trainer.optimizer.param_groups[0]["lr"]))
        return loss

    def plan(router, *args, training, call, **kwargs):
        if call.seed is not None:  # not the samples'
            routings.append((router.is_routing(training, call), int(call.seed)))
        return router_plan(router, *args, training=training, call=call, **kwargs)

    routings, router_plan = [], TokenRouter.plan
    monkeypatch.setattr(TokenRouter, "plan", plan)
    monkeypatch.setattr(train_tread.Trainer, "train_step", watch)
    train("--config", config(), "--output_dir", tmp_path / "run", "--dense_fraction", 0.3)
    assert [routing for routing, _, _ in seen] == [True] * 7 + [False] * 3
    assert len({seed for _, seed, _ in seen}) == 10

    # Two warm-up steps, then half a cosine over the other eight; the rate in force after each step.
    shape = [step / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 8) for step in range(1, 11)]
    assert [rate for _, _, rate in seen] == pytest.approx([0.01 * share for share in shape], abs=1e-12)


class NoReading(TorchDispatchMode):
    """Refuses what reads a value of a tensor and so, on an accelerator, waits for it."""

    readers = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.readers, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("routes", ["default", "none"])
def test_nothing_in_a_step_waits_for_the_device(config, tmp_path, monkeypatch, routes):
    """From the batch to clipping, optimiser, schedule, average and sum of losses; the log alone reads."""
    train_step, reads = train_tread.Trainer.train_step, []

    def watch(trainer):
        with NoReading():
            return train_step(trainer)

    def read(monitor, step):
        reads.append(step)
        with pytest.raises(AssertionError), NoReading():
            monitor_read(monitor, step)
        return monitor_read(monitor, step)

    monkeypatch.setattr(base, "check_scale", lambda latents: None)  # which looks on the CPU alone
    monitor_read = trainer.LossMonitor.read
    monkeypatch.setattr(train_tread.Trainer, "train_step", watch)
    monkeypatch.setattr(trainer.LossMonitor, "read", read)
    path = config(max_train_steps=4, logging_steps=3, checkpointing_steps=4, train_batch_size=4)
    train("--config", path, "--routes", routes, "--log_loss_by_time", "--output_dir", tmp_path / "run")
    assert reads == [3, 4]


def test_the_loss_by_time_is_logged_and_changes_nothing_nor_does_the_name_of_a_shift(config, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda accelerator, values, step: logged.append(values))
    argv = ["--config", config(max_train_steps=2, logging_steps=1, train_batch_size=8), "--objective_config"]
    train(*argv, '{"shift": "auto"}', "--log_loss_by_time", "--output_dir", tmp_path / "named")
    train(*argv, '{"shift": 0.125}', "--output_dir", tmp_path / "given")  # sqrt(1 * 8 * 8 / 4096)
    assert_bitwise_equal(tmp_path / "named", tmp_path / "given")
    for watched, plain in zip(logged[:2], logged[2:], strict=True):
        assert watched["loss"] == plain["loss"] and "loss_t0" not in plain
        quarters = [watched[f"loss_t{quarter}"] for quarter in range(4)]
        assert len(set(quarters)) == 4 and sum(quarters) / 4 == pytest.approx(plain["loss"], rel=1e-5)

    # The number is what the folder says, and what the samples are made with.
    settings = json.loads((tmp_path / "named" / "train_config.json").read_text())
    assert json.loads(settings["objective_config"]) == {"shift": 0.125}
    assert TREADPipeline.from_pretrained(tmp_path / "named" / "pipeline").scheduler.config.shift == 0.125


def test_the_log_tells_the_flops_in_force(config, tmp_path, monkeypatch):
    logged = {}
    monkeypatch.setattr(Accelerator, "log", lambda accelerator, values, step: logged.update({step: values}))
    train("--config", config(), "--dense_fraction", 0.3, "--output_dir", tmp_path / "run")
    model = TREADTransformer2DModel(**json.loads((tmp_path / "run" / "train_config.json").read_text())["model"])
    routed, dense = training_flops(model), training_flops(model, selection_ratio=0.0)
    assert sorted(logged) == [2, 3, 4, 6, 8, 9, 10] and routed < dense
    for step, values in logged.items():
        flops = 1e12 * values["model_tflops_per_second"] / values["images_per_second"]
        assert flops == pytest.approx(routed if step <= 7 else dense)


def test_the_precision_of_products_is_set_and_is_part_of_the_run(config, tmp_path, monkeypatch):
    losses = []
    monkeypatch.setattr(Accelerator, "log", lambda accelerator, values, step: losses.append(values["loss"]))
    argv = ["--config", config(max_train_steps=1, train_batch_size=64), "--output_dir"]
    train(*argv, tmp_path / "exact")
    assert torch.get_float32_matmul_precision() == "highest"
    train(*argv, tmp_path / "run", "--matmul_precision", "medium")
    assert torch.get_float32_matmul_precision() == "medium"
    assert losses[1] == pytest.approx(losses[0], rel=2**-7)  # bfloat16's rounding, the coarsest it may be
    with pytest.raises(ValueError, match="matmul_precision: 'medium' there, 'highest' now"):
        train(*argv, tmp_path / "run")


def test_labels_are_dropped_at_the_asked_rate(config, tmp_path, monkeypatch):
    labels = []
    next_batch = train_tread.Trainer.next_batch

    def watch(trainer, micro_step):
        batch = next_batch(trainer, micro_step)
        labels.extend(batch[1]["class_labels"].tolist())
        return batch

    monkeypatch.setattr(train_tread.Trainer, "next_batch", watch)
    train("--config", config(train_batch_size=60, max_train_steps=5), "--output_dir", tmp_path / "run")
    dropped, total = labels.count(10), len(labels)
    assert total == 600 and abs(dropped - 0.3 * total) < 4 * (total * 0.3 * 0.7) ** 0.5


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(config, tmp_path):
    output = tmp_path / "run"
    train("--config", config(max_train_steps=4), "--output_dir", output)
    with pytest.raises(ValueError, match="finite loss|finite weights"):
        train("--config", config(max_train_steps=40, learning_rate=1e30, lr_scheduler="constant"),
              "--output_dir", output, "--resume_from_checkpoint", "latest", "--logging_steps", 20)  # fmt: skip
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-3", "checkpoint-4"]
    verify_checkpoint(output / "checkpoint-4")
    (pipeline,) = output.glob("pipeline*")  # of the run before, whose name it has
    assert pipeline.name != "pipeline"
    assert all(tensor.isfinite().all() for weights in weights_of(output) for tensor in weights.values())


def test_weights_that_are_not_finite_are_never_written(config, tmp_path, monkeypatch):
    """A finite loss may still leave broken weights in the very step that a checkpoint follows."""
    train_step = train_tread.Trainer.train_step

    def break_weights(trainer):
        loss = train_step(trainer)
        if trainer.step == 5:
            trainer.parameters[0].data.view(-1)[0] = math.inf
        return loss

    monkeypatch.setattr(train_tread.Trainer, "train_step", break_weights)
    with pytest.raises(ValueError, match="finite weights, got others after step 6"):
        train("--config", config(), "--output_dir", tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_a_damaged_latest_checkpoint_is_skipped_and_only_as_many_as_asked_are_kept(config, tmp_path):
    path = config(checkpoints_total_limit=2)
    train("--config", path, "--output_dir", tmp_path / "whole")
    train("--config", path, "--output_dir", tmp_path / "damaged")
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == ["checkpoint-9", "checkpoint-10"]
    (tmp_path / "damaged" / "checkpoint-10" / "optimizer.bin").write_bytes(b"cut off")
    train("--config", path, "--output_dir", tmp_path / "damaged")
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "damaged")


def test_a_folder_of_another_run_or_model_is_refused_until_it_may_be_overwritten(config, tmp_path):
    argv = ["--config", config(max_train_steps=2), "--output_dir", tmp_path / "run"]
    train(*argv)
    with pytest.raises(ValueError, match="learning_rate: 0.01 there, 0.02 now"):
        train(*argv, "--learning_rate", 0.02)
    with pytest.raises(ValueError, match="model settings"):
        train(*argv, "--routes", "none", "--resume_from_checkpoint", "latest")
    before = weights_of(tmp_path / "run")[0]
    train(*argv, "--learning_rate", 0.02, "--overwrite_output_dir")
    after = weights_of(tmp_path / "run")[0]
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_too_many_damaged_images_stop_the_run(config, folder, tmp_path):
    with pytest.raises(ValueError, match="at most 0 unreadable images, got 1"):
        train("--config", config(), "--data", f"folder:{folder}", "--resolution", 8, "--max_corrupt_images", 0,
              "--output_dir", tmp_path / "run")  # fmt: skip


def test_without_data_flags_the_digits_recipe_applies_and_a_dry_run_prints_a_table_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    train("--dry_run", "--learning_rate", 0.004)
    assert not list(tmp_path.iterdir())
    table = capsys.readouterr().out.splitlines()
    assert len(table) <= 14 and all(len(line) < 120 for line in table)
    rows = dict(line.split(maxsplit=1) for line in table)
    assert rows["data"] == "digits:, 1797 images" and rows["sees"] == "1x8x8, 10 classes"
    assert "0.5M parameters" in rows["model"] and "50% of the tokens skip blocks 2 to 8" in rows["routes"]
    assert rows["steps"] == f"2000 of 16 images, {2000 / (1797 / 16):.3g} epochs"
    assert rows["optimiser"] == "AdamW at 0.004, cosine after 30 steps, clipped at 1"


def test_the_folder_holds_the_whole_of_the_settings(config, tmp_path):
    train("--config", config(max_train_steps=1), "--output_dir", tmp_path / "run", "--adam_beta2", 0.99)
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields - set(settings) == set(CONTROL_FIELDS)
    assert (settings["adam_beta2"], settings["steps_per_epoch"]) == (0.99, 1797 / 6)
    assert settings["model"]["routes"] == ROUTES and settings["model"]["in_channels"] == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_tried_without_its_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train("--recipe", name, "--dry_run")
    recipe, rows = RECIPES[name], dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    side = f"4x{recipe.resolution // 8}x{recipe.resolution // 8}" if recipe.on_latents else "3x64x64"
    assert rows["sees"] == f"{side}, 1000 classes" and recipe.preset in rows["model"]
    assert rows["steps"].startswith("400000 of 32 images") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["resolution", "num_classes"])
@pytest.mark.parametrize("data", ["hub:no/images", "latents:no/latents", "folder:nowhere"])
def test_a_dry_run_without_the_data_asks_for_what_they_would_tell(data, missing):
    given = {"resolution": 64, "num_classes": 3}
    flags = [f"--{name}={value}" for name, value in given.items() if name != missing]
    with pytest.raises(ValueError, match="Expected --resolution and --num_classes for a --dry_run without the data"):
        train("--dry_run", "--preset", "S/4", "--max_train_steps", 1, "--data", data, *flags)


def test_a_run_leaves_its_config_as_it_was(config, tmp_path, monkeypatch):
    seen, parse = [], train_tread.parse_train_config

    def watch(argv, **options):
        seen.extend([config := parse(argv, **options), copy.deepcopy(config)])
        return config

    monkeypatch.setattr(train_tread, "parse_train_config", watch)
    train("--config", config(max_train_steps=1), "--output_dir", tmp_path / "run")
    assert seen[0] == seen[1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].seed = 1


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_writes_into_the_folder_of_the_run_alone(config, tmp_path, monkeypatch, tracker):
    if find_spec(tracker) is None:  # without importing it: trackio looks for its folder as it is imported
        pytest.skip(f"{tracker} is not installed")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", "")  # to be as it was afterwards
    monkeypatch.delenv("TRACKIO_DIR")
    flags = ["--validation_steps", 2, "--num_validation_images", 1, "--validation_inference_steps", 1]
    train("--config", config(max_train_steps=2), "--output_dir", tmp_path / "run", "--report_to", tracker, *flags)
    assert [path for path in (tmp_path / "run" / "logs").rglob("*") if path.is_file()]
    assert not list((tmp_path / "elsewhere").iterdir())
    train("--config", config(max_train_steps=2), "--output_dir", tmp_path / "run", "--overwrite_output_dir")
    assert not [path for path in (tmp_path / "run" / "logs").rglob("*") if path.is_file()]


def test_the_script_stands_alone():
    source = Path(train_tread.__file__).read_text(encoding="utf-8")
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))}  # fmt: skip
    assert source.count("\n") <= 250
    siblings = {path.stem for path in Path(train_tread.__file__).parent.glob("*.py")}
    assert not siblings & {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "S/3", "--model_config_name_or_path", ""], "either --preset or"),
        (["--learning_rate", "0"], "learning_rate > 0"),
        (["--dense_fraction", "1.5"], r"dense_fraction in \[0, 1\]"),
        (["--resolution", "16"], "digits"),
        (["--random_flip"], "digits"),
        (["--routes", '[{"start": 2, "end": 9, "selection_ratio": 0.5}]'], "end"),
        (["--objective_config", '{"shitf": 2.0}'], "shitf"),
        (["--log_loss_by_time", "--train_batch_size", "2"], "train_batch_size >= 4"),
        (["--loss_terms", '{"reconstrution": {}}'], r"terms among \['reconstruction', .*got \['reconstrution'\]"),
        ([*RECONSTRUCTION, "--routes", "none"], "Expected a denoiser of this package with patches"),
        ([*RECONSTRUCTION, "--model_config_name_or_path", PIXELS], "Expected patches of several values"),
        (["--objective", "edm", "--objective_config", '{"sigma_data": -1}'], "sigma_data"),
        (["--model_config_name_or_path", '{"depth": 3}'], "depth"),
        (["--model_config_name_or_path", '{"num_classes": 3}'], "num_classes=10"),
        (["--report_to", "nosuchtracker"], "nosuchtracker"),
        (["--resume_from_checkpoint", "checkpoint-7"], "checkpoint-7"),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "got both"),
        (["--config", '{"learnign_rate": 1.0}'], "learnign_rate"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(config, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        train("--config", config(), "--output_dir", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


def test_a_delayed_route_trains_and_guides(config, tmp_path):
    routes = [{"start": 2, "end": 2, "selection_ratio": 0.5, "rejoin_from": 1}]
    argv = ["--config", config(max_train_steps=4, lr_warmup_steps=0), "--routes", json.dumps(routes)]
    train(*argv, "--dense_fraction", 0, "--output_dir", tmp_path / "run")
    pipe = TREADPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.transformer.config.routes == routes

    def images(routes):
        pipe.guider = SparseGuidance(weak_ratio=0.75)
        pipe.transformer = TREADTransformer2DModel.from_pretrained(
            tmp_path / "run/pipeline/transformer", routes=routes
        )
        return pipe(1, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    assert not torch.equal(images(routes), images([{"start": 2, "end": 2}]))


def test_a_fused_route_with_path_drop_resumes_exactly_and_guides(config, tmp_path):
    """Stopped in the dense end, where paths are dropped as well."""
    routes = [{"start": 1, "end": 1, "selection_ratio": 0.75, "rejoin": "fuse", "path_drop": 0.5}]
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "lr_warmup_steps": 0}
    argv = ["--config", config(**options), "--routes", json.dumps(routes), "--dense_fraction", 0.5, "--output_dir"]
    train(*argv, tmp_path / "whole")
    with interrupting(train_tread.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 5):
        train(*argv, tmp_path / "stopped")
    train(*argv, tmp_path / "stopped")
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")

    pipe = TREADPipeline.from_pretrained(tmp_path / "whole" / "pipeline", guider=PathDropGuidance())
    assert pipe.transformer.config.routes == routes and pipe.transformer.route_fusions["0"].mask.any()
    assert torch.isfinite(pipe(1, num_inference_steps=2, output_type="pt").images).all()


def test_the_options_of_the_papers_first_version_train(config, folder, tmp_path):
    routes = [
        {"start": 0, "end": 0, "selection_ratio": 0.5, "rejoin": "sum"},
        {"start": 1, "end": 2, "selection_ratio": 0.5, "rejoin": "input", "magnitude_mix": -0.5},
    ]
    argv = ["--config", config(max_train_steps=2), "--data", f"folder:{folder}", "--resolution", 8]
    argv += ["--objective", "edm", "--routes", json.dumps(routes), "--gradient_checkpointing"]
    train(*argv, "--output_dir", tmp_path / "plain")
    train(*argv, *RECONSTRUCTION, "--output_dir", tmp_path / "masked")
    loaded = TREADPipeline.from_pretrained(tmp_path / "masked" / "pipeline")
    assert loaded.transformer.config.routes == routes
    with pytest.raises(AssertionError):
        assert_bitwise_equal(tmp_path / "plain", tmp_path / "masked")
