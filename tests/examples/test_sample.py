# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The sampling example with a tiny pipeline, in one process and in several."""

import os
import random
from functools import partial

import numpy as np
import PIL.Image
import pytest
import sample
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from runs import call, files_of, launch
from scipy.spatial import geometric_slerp
from tiny_models import make_transformer, save_vae

from diffusers_tread import SparseGuidance, TREADPipeline
from diffusers_tread.metrics import PipelineImages
from diffusers_tread.pictures import FRAME


CELL = 64 + 2 * FRAME  # an 8 x 8 image in a sheet
run = partial(call, sample)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline: grey, 8 x 8, four classes with names."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    names = dict(enumerate(["ant", "bee", "cat", "dog"]))
    TREADPipeline(make_transformer(), FlowMatchEulerDiscreteScheduler(), id2label=names).save_pretrained(folder)
    return folder


@pytest.fixture
def argv(folder, tmp_path):
    words = ["--pretrained_pipeline", folder, "--num_inference_steps", 3, "--batch_size", 4]
    return [str(word) for word in [*words, "--output_dir", tmp_path / "samples"]]


def pixels(path):
    return np.array(PIL.Image.open(path))


def make_images(folder, **settings):
    settings = {"num_images": 100, "num_inference_steps": 3, "guidance_scale": 1.0} | settings
    return PipelineImages(TREADPipeline.from_pretrained(folder), **settings)


def shown_in(sheet):
    """The grey 8 x 8 image that the first cell of a sheet shows, enlarged and framed."""
    return sheet[FRAME : CELL - FRAME : 8, FRAME : CELL - FRAME : 8, 0]


def assert_close_images(image, other):
    """But for the rounding of another batch size."""
    assert np.abs(image.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("labels", ["--no-random_labels", "--random_labels"])
def test_images_are_the_samples_that_are_evaluated(argv, folder, tmp_path, labels):
    run(*argv, "--num_samples", 10, "--seed", 5, "--guidance", "cfg", "--guidance_scale", 2.5, labels)
    evaluated = make_images(folder, seed=5, guidance_scale=2.5, random_labels=labels == "--random_labels")
    for start in range(0, 10, 4):
        for index, image in enumerate(evaluated.read(start, min(start + 4, 10)), start=start):
            found = pixels(tmp_path / f"samples/images/{index:06d}.png").astype(int)
            # The script takes an accelerator where there is one; here the CPU samples.
            np.testing.assert_allclose(found, image[0].int(), rtol=0, atol=int(torch.accelerator.is_available()))
    assert [path.name for path in sorted((tmp_path / "samples").glob("*.png"))] == ["images-000000.png"]
    sheet = pixels(tmp_path / "samples/images-000000.png")
    if labels == "--random_labels":
        assert sheet.shape == (CELL, 10 * CELL, 3)
    else:  # a column per class and turn, with its name above
        assert sheet.shape == (22 + 2 * CELL, 8 * CELL, 3)
        assert all((sheet[:22, column * CELL :][:, :CELL] < 128).any() for column in range(8))


def test_latents_are_decoded(argv, folder, tmp_path):
    vae = save_vae(tmp_path / "vae", latent_channels=1)
    TREADPipeline.from_pretrained(folder, vae=vae).save_pretrained(tmp_path / "with_vae")
    run(*argv, "--num_samples", 2, "--pretrained_pipeline", tmp_path / "with_vae")
    images = make_images(tmp_path / "with_vae").read(0, 2)
    assert images.shape == (2, 3, 16, 16)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(pixels(tmp_path / f"samples/images/{index:06d}.png"), image.permute(1, 2, 0))


def test_a_class_sheet_shows_that_classes_samples(argv, folder, tmp_path):
    run(*argv, "--mode", "classes", "--class_labels", "dog,1", "--num_images_per_class", 3, "--guidance", "none")
    evaluated = make_images(folder)
    for label, indices in {1: (1, 5, 9), 3: (3, 7, 11)}.items():
        sheet = pixels(tmp_path / f"samples/classes-{label:04d}.png")
        assert sheet.shape == (22 + CELL, 3 * CELL, 3) and (sheet[:22] < 128).any()  # there is a title
        for column, index in enumerate(indices):
            shown = shown_in(sheet[22:, CELL * column :])
            assert_close_images(shown, evaluated.read(index, index + 1)[0, 0].numpy())


def test_a_grid_has_a_row_per_ratio_and_a_column_per_scale(argv, folder, tmp_path):
    grid = ["--mode", "grid", "--class_labels", "cat", "--guidance_scales", "1.5,3", "--weak_ratios", "0.5,0.7,0.9"]
    run(*argv, *grid, "--guidance", "sparse", "--strong_ratio", 0.1)
    sheet = pixels(tmp_path / "samples/grid-0002.png")
    left, top = sheet.shape[1] - 2 * CELL, sheet.shape[0] - 3 * CELL
    assert top == 44 and left > 40
    texts = [sheet[:22, left:], sheet[22:top, left : left + CELL], sheet[22:top, left + CELL :]]
    texts += [sheet[start : start + CELL, :left] for start in (top, top + CELL, top + 2 * CELL)]
    assert all((text < 128).any() for text in texts)
    seen = set()
    for row, ratio in enumerate((0.5, 0.7, 0.9)):
        for column, scale in enumerate((1.5, 3)):
            images = make_images(folder, guidance_scale=None)
            images.pipeline.guider = SparseGuidance(guidance_scale=scale, strong_ratio=0.1, weak_ratio=ratio)
            cell = shown_in(sheet[top + CELL * row :, left + CELL * column :])
            np.testing.assert_array_equal(cell, images.read(2, 3)[0, 0].numpy())
            seen.add(cell.tobytes())
    assert len(seen) == 6


def test_an_interpolation_goes_from_each_sample_to_the_next(argv, folder, tmp_path):
    flags = ["--mode", "interpolation", "--class_labels", 1, "--num_seeds", 3, "--num_frames", 4]
    run(*argv, *flags, "--guidance", "none")
    sheet = pixels(tmp_path / "samples/interpolation-0001.png")
    left, top = sheet.shape[1] - 4 * CELL, sheet.shape[0] - 2 * CELL
    cells = [[shown_in(sheet[top + CELL * i :, left + CELL * j :]) for j in range(4)] for i in range(2)]
    evaluated = make_images(folder)
    for row, (first, last) in enumerate([(1, 5), (5, 9)]):
        assert_close_images(cells[row][0], evaluated.read(first, first + 1)[0, 0].numpy())
        assert_close_images(cells[row][-1], evaluated.read(last, last + 1)[0, 0].numpy())
    assert len({cell.tobytes() for row in cells for cell in row}) == 7  # the second sample ends one row, begins one


def test_slerp_is_scipy_s_and_keeps_the_norm():
    start, end = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    one, other = (tensor.flatten() / tensor.norm() for tensor in (start, end))
    for share in (0.0, 0.3, 1.0):
        reference = torch.from_numpy(geometric_slerp(one.numpy(), other.numpy(), share))
        torch.testing.assert_close(sample.slerp(one, other, share), reference)
    torch.testing.assert_close(sample.slerp(start, end, 1.0), end)
    assert sample.slerp(start, end, 0.5).norm() > 0.9 * start.norm() > 1.2 * ((start + end) / 2).norm()


@pytest.mark.long
def test_two_processes_and_killed_runs_give_what_one_process_gives(argv, tmp_path):
    """Killed alone at a random image, then one of two processes at another, then left to finish."""
    image = random.Random(os.urandom(8)).randrange(1, 12)
    print(f"killed at image {image}")
    argv = [*argv[:-2], "--guidance", "sparse", "--num_samples", 30, "--output_dir"]
    kills = [
        {"at": ["diffusers_tread.files.publish"], "matching": r"\.png", "count": count} for count in (image + 1, 3)
    ]
    runs = [("one", 1, None), ("two", 2, None), ("killed", 1, kills[0]), ("killed", 2, kills[1]), ("killed", 2, None)]
    codes, _ = launch(
        {"script": "sample", "argv": [*argv, tmp_path / name], "processes": processes, "kill": kill}
        for name, processes, kill in runs
    )
    assert codes == [0, 0, -9, -9, 0]
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "killed")


def test_whole_images_are_kept_and_only_missing_ones_made(argv, tmp_path):
    flags = [*argv, "--num_samples", 6, "--guidance", "none"]
    run(*flags)
    before = files_of(tmp_path)
    kept, lost = tmp_path / "samples/images/000004.png", tmp_path / "samples/images/000005.png"
    lost.unlink()
    times = kept.stat().st_mtime_ns, (tmp_path / "samples/images/000000.png").stat().st_mtime_ns
    run(*flags)
    assert times == (kept.stat().st_mtime_ns, (tmp_path / "samples/images/000000.png").stat().st_mtime_ns)
    assert files_of(tmp_path) == before


def test_a_folder_with_images_of_other_settings_is_refused(argv, tmp_path):
    run(*argv, "--num_samples", 2, "--guidance", "none")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        run(*argv, "--num_samples", 2, "--guidance", "none", "--seed", 1)
    assert files_of(tmp_path) == before
    run(*argv, "--num_samples", 4, "--guidance", "none")
    assert len(list((tmp_path / "samples/images").iterdir())) == 4


def test_images_of_another_program_are_refused(argv, tmp_path):
    (tmp_path / "samples/images").mkdir(parents=True)
    PIL.Image.new("L", (8, 8)).save(tmp_path / "samples/images/000000.png")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="images/000000.png.* of unknown settings"):
        run(*argv, "--num_samples", 2, "--guidance", "none")
    assert files_of(tmp_path) == before


def test_settings_that_never_gave_an_image_bind_nobody(argv, tmp_path):
    with pytest.raises(ValueError, match="guidance_transformer"):
        run(*argv, "--num_samples", 2, "--guidance", "sparse", "--guider_config", '{"weak_checkpoint": true}')
    run(*argv, "--num_samples", 2, "--guidance", "none")
    assert len(list((tmp_path / "samples/images").iterdir())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 0", "--batch_size >= 1"),
        ("--mode interpolation --num_frames 1", "--num_frames >= 2"),
        ("--mode grid --num_samples 5 --guidance sparse", r"--mode grid uses, got \['num_samples'\]"),
        ("--mode grid", "--guidance sparse with --mode grid"),
        ("--mode grid --guidance sparse --weak_ratio 0.5", "--weak_ratios take their places"),
        ("--mode grid --guidance sparse --weak_ratios 0.5,many", "with commas between in .*'weak_ratios': '0.5,many'"),
        ("--mode grid --guidance sparse --weak_ratios 0.1,0.5", "Expected weak_ratio > strong_ratio"),
        ("--mode classes --class_labels 4", r"--class_labels in \[0, 4\), got \[4\]"),
        ("--mode classes --class_labels fox", "Expected class names among"),
        ("--guidance cfg", "--guidance_scale with --guidance cfg"),
        ("--pretrained_pipeline nowhere", "Expected a TREADPipeline in --pretrained_pipeline"),
    ],
)
def test_bad_input_is_refused_before_any_work(argv, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*argv, *flags.split())
    assert not (tmp_path / "samples").exists()
