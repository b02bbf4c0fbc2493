# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The demo from end to end, with a training far too short to pass its own bar."""

import re

import demo
import numpy as np
import pytest
from PIL import Image

from diffusers_tread import TREADPipeline


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(output folder, what was printed) of one run with few steps, of training and of sampling."""
    folder, lines = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "print", lambda *values, **_: lines.append(" ".join(map(str, values))), raising=False)
        patch.setattr(demo, "NUM_INFERENCE_STEPS", 4)
        assert demo.main(["--output_dir", str(folder), "--max_train_steps", "2", "--num_images", "10"]) == 1
    return folder, "\n".join(lines)


def test_it_leaves_a_pipeline_that_loads_and_a_picture_with_four_panels(run):
    folder, _ = run
    assert TREADPipeline.from_pretrained(folder / "pipeline").transformer.config.num_classes == 10
    pixels = np.asarray(Image.open(folder / "samples.png").convert("L"))
    assert pixels.shape == (400, 1600)
    assert all(pixels[:, start : start + 400].std() > 20 for start in range(0, 1600, 400))


def test_it_prints_an_accuracy_for_each_way_of_sampling_and_the_step_ratio_beside_its_ceiling(run):
    _, printed = run
    assert "FAILED" in printed  # after two steps nothing is recognised
    for name in demo.SAMPLINGS:
        assert re.search(rf"^{re.escape(name)} +\d+\.\d%", printed, re.MULTILINE)
    assert re.search(r"Dense/routed \d\.\d\d, FLOP ceiling 1\.46\.", printed)


def test_the_pipeline_loaded_once_more_gives_the_same_images(run):
    _, printed = run
    assert "loaded once more: yes" in printed


def test_an_image_depends_on_its_own_seed_alone(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(demo, "NUM_INFERENCE_STEPS", 4)
    pipeline, labels = demo.load_pipeline(folder / "pipeline"), np.arange(3)
    guider, _ = demo.SAMPLINGS[demo.SPARSE]
    together = demo.sample(pipeline, labels, guider, None).astype(int)
    alone = demo.sample(pipeline, labels[:1], guider, None).astype(int)
    assert np.abs(together[:1] - alone).max() <= 1


def test_the_judge_knows_real_digits_and_rejects_noise():
    judge, shown, accuracy = demo.train_judge()
    assert accuracy > 0.97
    assert (judge.predict(demo.flatten(shown.reshape(-1, 8, 8))) == np.tile(np.arange(10), 8)).mean() > 0.97
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    assert judge.score(demo.flatten(noise), np.arange(200) % 10) < 0.3


@pytest.mark.parametrize("num_images", ["0", "5", "15"])
def test_a_number_of_images_that_the_classes_do_not_share_is_refused(num_images, tmp_path):
    with pytest.raises(ValueError, match="divisible by the 10 classes"):
        demo.main(["--output_dir", str(tmp_path / "out"), "--num_images", num_images])
    assert not (tmp_path / "out").exists()
