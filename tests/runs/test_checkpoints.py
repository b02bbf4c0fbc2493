# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json
import logging
import os

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_tread.runs.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    replace_folder,
    save_checkpoint,
    verify_checkpoint,
)
from diffusers_tread.runs.ema import whole_weights


class Run:
    """A linear model under AdamW with an average, after a few steps."""

    names = ["weight", "bias"]

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.free_memory()
        model = torch.nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        self.ema = EMAModel(self.model.parameters(), decay=0.9, foreach=True)

    def train(self, steps):
        for _ in range(steps):
            self.accelerator.backward(self.model(torch.ones(4, 3)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())
        return self

    def save(self, folder, step, **options):
        options |= {"state": {"global_step": step}, "ema": self.ema, "ema_names": self.names}
        return save_checkpoint(self.accelerator, folder, step, **options)

    def weights(self):
        return [weight.clone() for weight in [*self.model.parameters(), *self.ema.shadow_params]]


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_training_after_a_load_is_bitwise_the_training_that_was_not_stopped(tmp_path):
    run = Run().train(5)
    checkpoint = run.save(tmp_path, 5)
    expected = run.train(4).weights()

    other = Run(seed=1)
    state = load_checkpoint(other.accelerator, checkpoint, ema=other.ema, ema_names=other.names)
    assert state["global_step"] == 5 and other.ema.optimization_step == 5
    assert all(torch.equal(*pair) for pair in zip(other.train(4).weights(), expected, strict=True))


def test_a_changed_byte_or_a_missing_file_is_found(tmp_path):
    checkpoint = Run().save(tmp_path, 1)
    verify_checkpoint(checkpoint)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # same size
        with pytest.raises(ValueError, match="whole checkpoint|damaged"):
            verify_checkpoint(checkpoint)
        path.unlink()
        with pytest.raises(ValueError, match="whole checkpoint|damaged"):
            verify_checkpoint(checkpoint)
        path.write_bytes(content)
    verify_checkpoint(checkpoint)


def test_latest_skips_damaged_and_half_written_checkpoints_and_says_so(tmp_path, caplog):
    run = Run()
    for step in (9, 10, 11):
        run.save(tmp_path, step)
    (tmp_path / "checkpoint-11" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "checkpoint-12.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path).name == "checkpoint-10"
    assert "checkpoint-11" in caplog.text and "checkpoint-12.tmp" in caplog.text
    assert not (tmp_path / "checkpoint-12.tmp").exists()


def test_a_checkpoint_is_found_by_name_and_by_path_but_not_when_damaged(tmp_path):
    checkpoint = Run().save(tmp_path, 3)
    assert find_checkpoint(tmp_path, "checkpoint-3") == find_checkpoint(tmp_path / "other", str(checkpoint))
    with pytest.raises(ValueError, match="which does not exist"):
        find_checkpoint(tmp_path, "checkpoint-4")
    (checkpoint / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match="optimizer.bin"):
        find_checkpoint(tmp_path, "checkpoint-3")


def test_rotation_keeps_the_newest_by_number_once_the_new_one_is_whole(tmp_path, monkeypatch):
    run = Run()
    for step in (8, 9, 10):
        run.save(tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10"]

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save(tmp_path, 11, total_limit=2)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10"]


def test_saving_a_step_again_replaces_a_damaged_checkpoint(tmp_path):
    run = Run()
    checkpoint = run.save(tmp_path, 2)
    (checkpoint / "model.safetensors").write_bytes(b"")
    verify_checkpoint(run.save(tmp_path, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_trainers_state_is_plain_json(tmp_path):
    checkpoint = Run().train(2).save(tmp_path, 2)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state == {"global_step": 2, "ema_optimization_step": 2}


def test_a_checkpoint_without_averages_is_refused_where_they_are_wanted(tmp_path):
    run = Run()
    checkpoint = save_checkpoint(run.accelerator, tmp_path, 1, state={})
    with pytest.raises(ValueError, match="averaged weights"):
        load_checkpoint(run.accelerator, checkpoint, ema=run.ema, ema_names=run.names)


def test_whole_weights_share_their_storage_where_they_lie():
    run = Run().train(3)
    whole = whole_weights(run.ema.shadow_params, run.names, device="cpu")
    assert list(whole) == run.names
    pairs = zip(whole.values(), run.ema.shadow_params, strict=True)
    assert all(weight.data_ptr() == shadow.data_ptr() and not weight.requires_grad for weight, shadow in pairs)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["old", "old/new"]
