# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Overwriting deletes what manifests say a run wrote, whatever lies beside it."""

import pytest
from accelerate import Accelerator

from diffusers_tread.runs.checkpoints import save_checkpoint
from diffusers_tread.runs.folder import open_run_folder


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, samples, logs and a pipeline."""
    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()

    def run(**options):
        with open_run_folder(tmp_path / "run", settings={"seed": 0}, total_steps=9, **options) as run:
            if not options:
                save_checkpoint(accelerator, run.folder, 5, state={"settings": {}}, lineage=run.lineage)
                for name in ("samples/step-0000005.png", "logs/a/events", "pipeline/model/weights"):
                    (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (run.folder / name).touch()
                run.record("samples/step-0000005.png", "logs", "pipeline", "checkpoint-5")
        return files(run.folder)

    return run


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


NEW = {"run.json", "train_config.json"}


def test_what_the_run_wrote_goes_and_empty_folders_too(run, tmp_path):
    assert len(run()) == 8
    assert run(overwrite=True) == NEW and {path.name for path in (tmp_path / "run").iterdir()} == NEW


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "samples/mine.png", "logs/thesis.log", "checkpoint-best/weights", "hub/config.json", "eval/a.npz"],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_what_others_wrote_stays_and_is_said(run, tmp_path, caplog, name, is_before):
    def write():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")

    if is_before:
        write()
    run()
    write()
    assert run(overwrite=True) == NEW | {name}
    assert name in caplog.text


@pytest.mark.parametrize("name", ["checkpoint-5/notes.txt", "pipeline/README.md", "checkpoint-7/weights"])
def test_what_others_wrote_into_folders_that_are_replaced_is_refused_before_anything_is_deleted(run, tmp_path, name):
    before = run()
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"makes room, got .*{name}"):
        run(overwrite=True)
    assert files(tmp_path / "run") == before | {name}


def test_a_checkpoint_with_a_damaged_manifest_goes_by_the_run_s_own_list(run, tmp_path):
    run()
    (tmp_path / "run" / "checkpoint-5" / "manifest.json").write_text("[]")
    assert run(overwrite=True) == NEW


@pytest.mark.parametrize("content", ["", "[]", '{"written": ["../outside"]}', '{"written": "outside"}'])
def test_a_damaged_list_deletes_nothing_that_it_does_not_name(run, tmp_path, content):
    (tmp_path / "outside").write_text("mine")
    before = run()
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(ValueError, match="makes room, got .*pipeline/model/weights"):
        run(overwrite=True)
    assert files(tmp_path / "run") == before and (tmp_path / "outside").exists()


def test_links_out_of_the_folder_are_not_followed(run, tmp_path):
    run()
    (tmp_path / "run" / "samples").rename(tmp_path / "mine")
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "mine")
    run(overwrite=True)
    assert (tmp_path / "mine" / "step-0000005.png").exists()


def test_a_folder_with_a_result_of_unknown_origin_is_refused(run, tmp_path):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "pipeline" / "weights").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="pipeline"):
            run(**options)
    assert files(tmp_path / "run") == {"pipeline/weights"}
