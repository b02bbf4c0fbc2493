# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The demo on avatars: from end to end in this process, with drawn squares for avatars and far too few steps."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import demo_avatars
import make_avatars
import numpy as np
import PIL.Image
import pytest
import sample
import torch
import train_tread
from runs import call


pytestmark = pytest.mark.long
FLAGS = "--num_train_images 40 --num_judge_images 80 --max_train_steps 8 --num_images 40 --num_inference_steps 2"

QUICK = {
    "model_config_name_or_path": json.dumps(demo_avatars.MODEL | {"num_attention_heads": 1}),
    "validation_inference_steps": 2,
}


def squares(count, seed):
    """Images of which each of twenty classes has a square of its own place and colour, and their labels."""
    generator, labels = np.random.default_rng(seed), np.arange(count) % 20
    pixels = generator.integers(0, 60, (count, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        top, left = 3 * (label % 5), 3 * (label // 5)
        image[top : top + 3, left : left + 3] = 80 + 8 * label
    return pixels, labels


def draw_squares(argv):
    """Instead of make_avatars.main: a folder as it writes one."""
    args = make_avatars.parse_args(argv)
    rows, folder = [], Path(args.output_dir)
    for index, (pixels, label) in enumerate(zip(*squares(args.num_images, len(args.split)), strict=True)):
        name = f"{args.styles[label]}/{index:07d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / name)
        rows.append({"file_name": name, "label": int(label), "class_name": args.styles[label]})
    (folder / "settings.json").write_text(json.dumps({"styles": args.styles}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(output folder, what was printed)."""
    folder, lines = tmp_path_factory.mktemp("demo"), []

    def run_here(command, env):
        task, *argv = command[3:]
        if task == "make-avatars":
            draw_squares(argv)
        else:
            call({"train": train_tread, "sample": sample}[task], *argv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo_avatars, "print", lambda *values, **_: lines.append(" ".join(map(str, values))), raising=False
        )
        patch.setattr(demo_avatars, "run_command", run_here)
        patch.setattr(demo_avatars, "ThreadPoolExecutor", lambda max_workers: nullcontext(SimpleNamespace(map=map)))
        patch.setattr(demo_avatars, "TRAINING", demo_avatars.TRAINING | QUICK)
        code = demo_avatars.main(["--output_dir", str(folder), "--judge_steps", "2", *FLAGS.split()])
    assert code == 1  # nothing is recognised after so few steps
    return folder, "\n".join(lines)


def test_it_prints_a_verdict_for_real_images_and_each_way_of_sampling(run):
    _, printed = run
    for name in ("real", *demo_avatars.SAMPLINGS):
        assert re.search(rf"^{name} +\d+\.\d% +[a-z-]+ \d+% +\d+\.\d\d$", printed, re.MULTILINE)
    assert "FAILED" in printed


def test_its_pictures_show_the_images_in_their_rows_and_columns(run):
    folder, _ = run
    path = folder / "avatars" / "train" / "blobs" / "0000000.png"
    first = PIL.Image.open(path).resize([80, 80], PIL.Image.Resampling.NEAREST)
    for name, row, num_rows in (("samples", 0, 8), ("along_training", 8, 9)):
        sheet = PIL.Image.open(folder / f"{name}.png")
        assert sheet.height == 2 * (22 + 82 * num_rows)
        left, top = sheet.width - 820 + 1, 22 + 82 * row + 1
        assert np.array_equal(sheet.crop((left, top, left + 80, top + 80)), first)


def test_a_row_of_the_course_has_the_images_of_the_trainings_grid(run):
    folder, _ = run
    paths = sorted((folder / "run" / "samples").glob("step-*.png"))
    assert [path.name for path in paths] == [f"step-{step:07d}.png" for step in range(1, 9)]
    images, grid = demo_avatars.cut_grid(paths[-1]), np.asarray(PIL.Image.open(paths[-1]).convert("RGB"))
    assert len(images) == 20 and {image.size for image in images} == {(16, 16)}
    last = np.asarray(images[-1]).repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(grid[-65:-1, -65:-1], last)


def test_the_judge_learns_classes_and_tells_their_images_from_noise():
    images = [
        demo_avatars.Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), ["name"] * 20)
        for pixels, labels in (squares(200, seed) for seed in range(3))
    ]
    judge = demo_avatars.Judge(images[0], heldout=images[1], num_steps=60)
    verdict = judge(images[2])
    noise = torch.randint(0, 256, (200, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    of_noise = judge(demo_avatars.Images(noise, images[2].labels, images[2].names))
    assert verdict.accuracy > 0.9 > 0.2 > of_noise.accuracy
    assert verdict.worst_accuracy <= verdict.accuracy
    assert of_noise.distance > 5 * verdict.distance


@pytest.mark.parametrize("flag", ["--num_train_images 39", "--num_images 20", "--num_judge_images 79"])
def test_too_few_images_are_refused(flag, tmp_path):
    with pytest.raises(ValueError, match=f"Expected {flag.split()[0]} >= "):
        demo_avatars.main(["--output_dir", str(tmp_path / "out"), *flag.split()])
    assert not (tmp_path / "out").exists()
