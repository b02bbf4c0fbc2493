# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoints are a run's own: those of its branch, whole, and none of what it left behind."""

import json
import shutil

import pytest
from accelerate import Accelerator

from diffusers_tread.runs.checkpoints import list_checkpoints, read_manifest, save_checkpoint
from diffusers_tread.runs.folder import open_run_folder


A, B = {"learning_rate": 0.1, "seed": 0}, {"learning_rate": 0.2, "seed": 0}
SHAPES = ["", "{", "[]", "null", '"text"', "{}", '{"step": 5}', '{"step": 5, "lineage": 3, "files": {}}',
          '{"step": "5", "lineage": [["a", 0]], "files": {"trainer_state.json": {"size": 1, "sha256": "0"}}}',
          '{"step": 5, "lineage": [[1, 0]], "files": {"trainer_state.json": {"size": 1, "sha256": "0"}}}',
          '{"step": 5, "lineage": [], "files": {"trainer_state.json": 7}}',
          '{"step": 5, "lineage": [], "files": ["trainer_state.json"]}', "[" * 100_000]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Runs in one folder: writes checkpoints and maybe a pipeline; gives the name of the checkpoint it began at."""
    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()

    def run(settings, steps=(), *, resume=None, finish=False, limit=None, folder=tmp_path / "run", total=60):
        settings = settings | {"max_train_steps": total}
        options = {"settings": settings, "total_steps": total, "resume_from_checkpoint": resume}
        with open_run_folder(folder, **options) as opened:
            for step in steps:
                state = {"settings": settings}
                save_checkpoint(accelerator, folder, step, state=state, lineage=opened.lineage, total_limit=limit)
            if finish:
                (folder / "pipeline").mkdir(exist_ok=True)
                (folder / "pipeline" / "weights").write_text(str(settings))
                opened.record("pipeline")
        return opened.checkpoint and opened.checkpoint.name

    return run


def damage(checkpoint):
    (checkpoint / "trainer_state.json").write_text("{}")


def steps(folder):
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


def test_a_run_that_went_back_goes_on_from_its_own_branch(run, tmp_path, caplog):
    run(A, [20, 40, 60])
    assert run(B, [30], resume="checkpoint-20") == "checkpoint-20"
    assert "'checkpoint-40', 'checkpoint-60'] in" in caplog.text  # are no longer this run's
    assert run(B) == "checkpoint-30"
    assert run(B, resume="latest") == "checkpoint-30"


def test_a_run_that_went_back_with_the_same_settings_leaves_its_old_branch_too(run):
    run(A, [20, 40])
    run(A, [25], resume="checkpoint-20")
    assert run(A) == "checkpoint-25"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_where_it_began(run, tmp_path):
    run(A, [20, 40])
    run(B, resume="checkpoint-20")
    assert run(B) == "checkpoint-20"
    shutil.copytree(tmp_path / "run" / "checkpoint-40", tmp_path / "elsewhere")
    other = {"folder": tmp_path / "other"}
    run(B, resume=str(tmp_path / "elsewhere"), **other)
    assert run(B, **other) == "elsewhere"
    damage(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match="Expected a whole checkpoint of the run in .*other, got none, nor .*elsewhere"
    ):
        run(B, **other)


def test_a_branch_of_a_branch_and_the_way_back(run):
    run(A, [20, 40])
    run(B, [30, 50], resume="checkpoint-20")
    run(B, [35], resume="checkpoint-30")
    assert run(B) == "checkpoint-35"
    run(A, [45], resume="checkpoint-40")  # to the first branch
    assert run(A) == "checkpoint-45"


@pytest.mark.parametrize("change", ["seed", "batch", "data", "max_train_steps"])
def test_changed_settings_are_refused_until_they_are_asked_for_and_then_make_a_branch(run, change):
    run(A, [20, 40])
    changed, total = A | {change: 7}, {"total": 50} if change == "max_train_steps" else {}
    changed = A if total else changed
    with pytest.raises(ValueError, match=f"{change}: .* there, .* now"):
        run(changed, **total)
    assert run(changed, [45], resume="latest", **total) == "checkpoint-40"
    assert run(changed, **total) == "checkpoint-45"
    with pytest.raises(ValueError, match=f"{change}: "):
        run(A)


@pytest.mark.parametrize(
    ("settings", "total", "resume"),
    [(A, 30, "latest"), (A, 60, "latest"), (B, 60, "latest"), (B, 60, "checkpoint-60"), (A, 30, "checkpoint-60")],
)
def test_finished_weights_are_not_given_out_as_those_of_another_run(run, tmp_path, settings, total, resume):
    run(A, [30, 60], finish=True)
    if (settings, total) == (A, 60):
        assert run(settings, resume=resume, total=total) == "checkpoint-60"
        assert (tmp_path / "run" / "pipeline").exists()
        return
    with pytest.raises(ValueError, match="leaves a step to train, got .*checkpoint-60 of step 60 for a run of"):
        run(settings, resume=resume, total=total)
    assert (tmp_path / "run" / "pipeline").exists() and run(A) == "checkpoint-60"


def test_the_pipeline_of_the_branch_before_is_set_aside(run, tmp_path):
    run(A, [30, 60], finish=True)
    before = (tmp_path / "run" / "pipeline" / "weights").read_text()
    run(B, resume="checkpoint-30")
    (kept,) = (tmp_path / "run").glob("pipeline*")
    assert kept.name != "pipeline" and (kept / "weights").read_text() == before
    assert f"{kept.name}/weights" in json.loads((tmp_path / "run" / "run.json").read_text())["written"]


def test_rotation_counts_whole_checkpoints_of_the_branch_up_to_the_present_step(run, tmp_path):
    folder = tmp_path / "run"
    run(A, [50, 60], limit=2)
    for step in (50, 60):
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("cut")
    assert run(A, [10, 20, 30], limit=2) is None
    assert steps(folder) == [20, 30, 50, 60]  # the damaged ones neither count nor push others out
    assert run(A, [40], limit=1) == "checkpoint-30"
    assert steps(folder) == [40, 50, 60]


def test_rotation_leaves_later_checkpoints_of_another_branch(run, tmp_path):
    run(A, [10, 20, 40, 50])
    run(B, [30], resume="checkpoint-20", limit=1)
    assert steps(tmp_path / "run") == [30, 40, 50]
    run(B, [45], limit=1)
    assert steps(tmp_path / "run") == [40, 45, 50]


def test_checkpoints_that_lie_elsewhere_rotate_by_their_links(run, tmp_path):
    run(A, [10, 20])
    (tmp_path / "run" / "checkpoint-10").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-10").symlink_to(tmp_path / "elsewhere")
    run(A, [30], limit=1)
    assert steps(tmp_path / "run") == [30] and (tmp_path / "elsewhere" / "manifest.json").exists()


@pytest.mark.parametrize("content", SHAPES)
def test_damaged_manifests_of_any_shape_are_skipped_and_said(run, tmp_path, caplog, content):
    run(A, [10, 20, 30])
    (tmp_path / "run" / "checkpoint-30" / "manifest.json").write_text(content)
    assert run(A, [40], limit=2) == "checkpoint-20"
    assert "Skipping a damaged checkpoint" in caplog.text and "checkpoint-30" in caplog.text
    assert steps(tmp_path / "run") == [20, 30, 40]


@pytest.mark.parametrize("content", SHAPES)
def test_a_damaged_record_of_the_run_is_refused_unless_a_checkpoint_is_named(run, tmp_path, content):
    run(A, [10, 20])
    (tmp_path / "run" / "run.json").write_text(content)
    for resume in (None, "latest"):
        with pytest.raises(ValueError, match=r"run.json.*\['checkpoint-10', 'checkpoint-20'\].*name one by"):
            run(A, resume=resume)
    assert run(A, [15], resume="checkpoint-10") == "checkpoint-10"
    assert run(A) == "checkpoint-15"


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(run, tmp_path, caplog):
    run(A, [10, 20])
    (tmp_path / "run" / "checkpoint-20").rename(tmp_path / "run" / "checkpoint-50")
    assert run(A) == "checkpoint-10"
    assert "checkpoint-50 is of step 20" in caplog.text


def test_a_checkpoint_of_this_folder_is_preferred_to_a_namesake_in_the_working_directory(run, tmp_path, monkeypatch):
    run(A, [10])
    run(B, [10], folder=tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    run(A, resume="checkpoint-10")
    lineage = read_manifest(tmp_path / "run" / "checkpoint-10").lineage
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lineage"][0] == list(lineage[0])
