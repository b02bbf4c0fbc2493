# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Whatever is written to a disk that fills up: an error that names the disk, and no half of it."""

import resource

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from diffusers_tread import EDMHeunScheduler, TREADPipeline, TREADTransformer2DModel
from diffusers_tread.files import find_disk, full_disk_explained, is_disk_full, whole, write_json
from diffusers_tread.metrics import FeatureStatistics
from diffusers_tread.metrics.feature_store import FeatureStore
from diffusers_tread.metrics.npz import save_statistics
from diffusers_tread.pictures import save_image
from diffusers_tread.runs.checkpoints import find_checkpoint, save_checkpoint


def checkpoint(folder):
    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()
    model = torch.nn.Linear(100, 100)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    save_checkpoint(accelerator, folder, 5, state={})


def pipeline(folder):
    model = TREADTransformer2DModel(
        sample_size=8, in_channels=1, num_attention_heads=2, attention_head_dim=8, num_layers=6, patch_size=2
    )
    with whole(folder / "pipeline") as temporary:
        TREADPipeline(model, EDMHeunScheduler()).save_pretrained(temporary)


def features(folder):
    FeatureStore(folder, num_images=1, batch_size=1, settings={}).write(0, {"features": torch.ones(1, 9999)})


def statistics(folder):
    values = FeatureStatistics.from_features(torch.randn(99, 99), extractor="own:1")
    save_statistics(folder / "statistics.npz", {"features": values})


def picture(folder):
    noise = np.random.RandomState(0).randint(0, 256, (99, 99, 3), dtype=np.uint8)
    save_image(PIL.Image.fromarray(noise), folder / "0.png")


def torch_file(folder):
    with whole(folder / "weights.bin") as temporary:
        torch.save(torch.zeros(99999), temporary)


def text(folder):
    write_json(folder / "long.json", ["word"] * 9999)


@pytest.fixture
def full_disk():
    """Files may have 1000 bytes: the kernel says no, wherever a library writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [checkpoint, pipeline, features, statistics, picture, torch_file, text])
def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path, full_disk, write):
    with pytest.raises(OSError, match=f"Expected room for {tmp_path}.* on the disk {find_disk(tmp_path)}.*MiB free"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_whole_checkpoint_survives_the_half_one_that_should_replace_it(tmp_path):
    checkpoint(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="which goes on from the last whole checkpoint"):
            checkpoint(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_checkpoint(tmp_path).name == "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_every_library_s_way_of_saying_it_is_known(tmp_path, error):
    assert is_disk_full(error)
    with pytest.raises(OSError, match="on the disk"), full_disk_explained(tmp_path):
        raise error


@pytest.mark.parametrize("error", [ValueError("a wrong shape"), OSError(5, "Input/output error"), KeyError("step")])
def test_other_errors_stay_what_they_are_and_leave_nothing_either(tmp_path, error):
    with pytest.raises(type(error)) as raised, whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error and not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_what_a_killed_process_left(tmp_path):
    (tmp_path / "pipeline.tmp").mkdir()
    (tmp_path / "pipeline.tmp" / "half").touch()
    with whole(tmp_path / "pipeline") as temporary:
        temporary.mkdir()
        (temporary / "whole").touch()
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["pipeline", "whole"]
