# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from accelerate import Accelerator

from diffusers_tread.runs.checkpoints import save_checkpoint
from diffusers_tread.runs.folder import open_run_folder


SETTINGS = {"learning_rate": 0.1, "report_to": "none", "model": {"num_layers": 6}}


@pytest.fixture
def claim(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()

    def call(settings=SETTINGS, *, steps=(), record=(), **options):
        """A run that writes some checkpoints and ends; where it began."""
        fixed = {"free_settings": ["report_to"], "fixed_settings": ["model"], "total_steps": 60} | options
        with open_run_folder(tmp_path, settings=settings, **fixed) as run:
            state = {"settings": settings}
            for step in steps:
                save_checkpoint(accelerator, tmp_path, step, state=state, lineage=run.lineage)
            run.record(*record)
        return run.checkpoint

    return call


def written(folder):
    return json.loads((folder / "train_config.json").read_text())


def test_a_new_folder_starts_a_run_and_the_same_run_resumes(claim, tmp_path):
    assert claim() is None and written(tmp_path) == SETTINGS
    claim(steps=[5])
    assert claim().name == "checkpoint-5"
    assert claim(SETTINGS | {"report_to": "wandb"}).name == "checkpoint-5"


def test_a_setting_that_is_new_and_unset_is_no_other_run(claim):
    claim(steps=[5])
    newer = SETTINGS | {"model": SETTINGS["model"] | {"patch_bottleneck_dim": None}, "preset_config": None}
    assert claim(newer).name == "checkpoint-5"
    assert claim(newer, resume_from_checkpoint="latest").name == "checkpoint-5"
    with pytest.raises(ValueError, match="Expected the model settings"):
        claim(SETTINGS | {"model": SETTINGS["model"] | {"patch_bottleneck_dim": 8}}, resume_from_checkpoint="latest")


def test_another_run_is_refused_and_its_folder_left_alone(claim, tmp_path):
    claim()
    with pytest.raises(ValueError, match="learning_rate: 0.1 there, 0.2 now"):
        claim(SETTINGS | {"learning_rate": 0.2})
    with pytest.raises(ValueError, match="batch: None there, 4 now"):
        claim(SETTINGS | {"batch": 4})
    assert written(tmp_path) == SETTINGS


def test_a_named_checkpoint_goes_on_with_other_settings_but_not_with_another_model(claim, tmp_path):
    claim(steps=[5])
    with pytest.raises(ValueError, match="num_layers"):
        claim(SETTINGS | {"model": {"num_layers": 8}}, resume_from_checkpoint="latest")
    assert written(tmp_path) == SETTINGS
    changed = SETTINGS | {"learning_rate": 0.2}
    assert claim(changed, resume_from_checkpoint="latest").name == "checkpoint-5"
    assert written(tmp_path) == changed


def test_checkpoints_of_an_unknown_run_are_refused(claim, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="no run.json"):
        claim()


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(claim, tmp_path):
    claim(steps=[5])
    (tmp_path / "notes.txt").write_text("mine")
    assert claim(SETTINGS | {"learning_rate": 0.2}, overwrite=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json", "train_config.json"]
