# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The text-to-image demo: from end to end in this process, with far too few steps."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import demo_text
import PIL.Image
import precompute_latents
import pytest
import torch
import train_text_to_image_tread
from diffusers import DiffusionPipeline, PRXPipeline
from runs import call

from diffusers_tread.demos import captioned_digits


pytestmark = pytest.mark.slow
FLAGS = "--num_train_images 40 --max_train_steps 2 --num_images 12"
TINY = {"hidden_size": 32, "num_heads": 1, "depth": 7}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(output folder, what was printed)."""
    folder, lines = tmp_path_factory.mktemp("demo"), []

    def run_here(command, env):
        task, *argv = command[3:]
        call({"precompute": precompute_latents, "train-text": train_text_to_image_tread}[task], *argv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "print", lambda *values, **_: lines.append(" ".join(map(str, values))), raising=False)
        patch.setattr(demo_text, "run_command", run_here)
        patch.setattr(demo_text, "ThreadPoolExecutor", lambda max_workers: nullcontext(SimpleNamespace(map=map)))
        patch.setattr(captioned_digits, "JUDGE_STEPS", 2)
        for name, value in {"VAE_STEPS": 2, "NUM_JUDGE_IMAGES": 40, "NUM_REAL_IMAGES": 40}.items():
            patch.setattr(demo_text, name, value)
        patch.setattr(demo_text, "TRANSFORMER", demo_text.TRANSFORMER | TINY)
        patch.setattr(demo_text, "TRAINING", demo_text.TRAINING | {"train_batch_size": 4})
        code = demo_text.main(["--output_dir", str(folder), "--num_inference_steps", "2", *FLAGS.split()])
    assert code == 1  # nothing is recognised after so few steps
    return folder, "\n".join(lines)


def test_it_prints_shares_for_real_images_and_each_kind_of_prompt_and_way_of_sampling(run):
    _, printed = run
    rows = [("real images", "")] + [(kind, way) for kind in demo_text.REQUIRED for way in demo_text.SAMPLINGS]
    for kind, way in rows:
        assert re.search(rf"^{kind} +{re.escape(way)}( +\d+\.\d%){{5}}$", printed, re.MULTILINE)
    assert "FAILED" in printed


def test_it_leaves_a_plain_pipeline_and_a_picture_of_both_kinds_of_prompts(run):
    folder, _ = run
    pipeline = DiffusionPipeline.from_pretrained(folder / "run" / "pipeline")
    assert type(pipeline) is PRXPipeline and pipeline.transformer.config.depth == 7
    image = pipeline("a red zero", num_inference_steps=1, use_resolution_binning=False).images[0]
    assert image.size == (32, 32)
    picture = PIL.Image.open(folder / "samples.png")
    assert picture.width == 6 * 162 and picture.height > 4 * 162


def test_captions_of_the_training_have_no_pair_that_is_held_out_and_all_words(run):
    folder, _ = run
    lines = (folder / "images" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    assert len(captions) == 40
    known, _ = captioned_digits.split_handwriting()
    _, seen, captions = captioned_digits.draw(600, known, is_seen=True, seed=1)
    _, unseen, others = captioned_digits.draw(200, known, is_seen=False, seed=1)
    pairs, held_out = ({tuple(pair) for pair in scenes[:, :2].tolist()} for scenes in (seen, unseen))
    assert len(pairs) == 40 and len(held_out) == 10 and not pairs & held_out
    assert {word for text in others for word in text.split()} <= {word for text in captions for word in text.split()}
    assert not set(captions) & set(others)


def test_an_image_has_the_colours_that_its_caption_says():
    known, _ = captioned_digits.split_handwriting()
    pixels, scenes, _ = captioned_digits.draw(60, known, is_seen=None, seed=5)
    for image, (_, ink, paper, _) in zip(pixels, scenes, strict=True):
        for index, colours, places in ((ink, captioned_digits.INKS, "ink"), (paper, captioned_digits.PAPERS, "paper")):
            told = torch.tensor(PIL.ImageColor.getrgb(list(colours.values())[index]))
            distances = (image.float() - told[:, None, None]).norm(dim=0)
            assert (distances < 45).float().mean() > {"ink": 0.05, "paper": 0.3}[places]


def test_another_set_of_images_in_the_folder_is_refused(run):
    folder, _ = run
    with pytest.raises(ValueError, match="got others"):
        demo_text.main(["--output_dir", str(folder), "--num_train_images", "41"])


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected --num_images >= 12"):
        demo_text.main(["--output_dir", str(tmp_path / "out"), "--num_images", "11"])
    assert not (tmp_path / "out").exists()


def test_a_text_of_any_bytes_goes_through_the_tokenizer():
    tokenizer = demo_text.make_tokenizer(["a red zero"] * 3)
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert len(tokenizer("a red zero").input_ids) == 4
    assert tokenizer.decode(tokenizer("Łódź ☂", add_special_tokens=False).input_ids).strip() == "Łódź ☂"
