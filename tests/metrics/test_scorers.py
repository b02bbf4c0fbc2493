# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Scorers: CLIPScore against its formula, scorers of users, and what is refused."""

import logging

import numpy as np
import pytest
import torch


pytest.importorskip("transformers")

from tiny_clip import save_clip  # noqa: E402
from tiny_evaluation import pixels  # noqa: E402
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipConfig, SiglipModel  # noqa: E402

from diffusers_tread.metrics import SCORERS, evaluate_images, load_scorer_file, load_scorers, register_scorer  # noqa: E402
from diffusers_tread.metrics.registry import is_higher_better, value_label  # noqa: E402
from diffusers_tread.metrics.scorers.clip_score import CLIPScore  # noqa: E402


PROMPTS = ["a red fox", "b", "", "zebra", "the quick brown fox jumps over"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def no_new_scorers(monkeypatch):
    monkeypatch.setattr("diffusers_tread.metrics.scorers.from_file._LOADED", {})
    before = dict(SCORERS)
    yield
    SCORERS.clear()
    SCORERS.update(before)


class Images:
    """Noise with prompts."""

    description = {"kind": "noise"}

    def __len__(self):
        return len(PROMPTS)

    def read(self, start, stop):
        return torch.from_numpy(pixels(0, len(PROMPTS), 36, 52)).permute(0, 3, 1, 2)[start:stop]

    def prompt(self, index):
        return PROMPTS[index]


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def test_clip_score_is_the_formula_of_transformers_embeddings(clip, caplog):
    images, model = Images().read(0, 5), CLIPModel.from_pretrained(clip).eval()
    inputs = AutoImageProcessor.from_pretrained(clip)(images=list(images), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(clip)

    def embed(get, inputs):  # one at a time, so that nothing is padded
        with torch.no_grad():
            output = get(inputs)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output)[0].numpy().astype(np.float64)

    cosines = []
    for row, prompt in enumerate(PROMPTS):
        image = embed(model.get_image_features, inputs["pixel_values"][row : row + 1])
        tokens = tokenizer(prompt, truncation=True, return_tensors="pt")["input_ids"]
        text = embed(model.get_text_features, tokens)
        cosines.append((image @ text) / np.sqrt((image @ image) * (text @ text)))
    assert np.abs(cosines).min() > 0.02

    (scorer,) = load_scorers(["clip"], clip_model=str(clip))
    for sign in (1, -1):  # which cosines are negative is chance, but none is so with both
        with caplog.at_level(logging.WARNING):
            scores = scorer(images, PROMPTS)[:, 0].numpy()
        expected = 100 * np.maximum(sign * np.array(cosines), 0)
        np.testing.assert_allclose(scores, expected, atol=0.5)  # the processors round pixels differently
        scorer.score.model.text_projection.weight.neg_()
    long = [record.message for record in caplog.records if "tokens" in record.message]
    assert len(long) == 1 and "1 of 5 prompts have more than 16" in long[0]


def test_a_siglip_is_read_whole(clip):
    """Its images are not cropped, and its texts have full length."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 54, "max_position_embeddings": 12}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 7}))
    settings = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    score = CLIPScore(model, AutoTokenizer.from_pretrained(clip), settings)
    images = Images().read(0, 5)
    pixel_values = score.prepare(images)
    assert pixel_values.shape == (5, 3, 28, 28) and -1 <= pixel_values.min() < pixel_values.max() <= 1
    lengths = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    scores = score(images, PROMPTS)
    assert scores.shape == (5,) and scores.min() >= 0 and scores.max() <= 100 and lengths == [12]


def test_scores_alone_need_no_reference_and_end_in_values_and_a_table(no_new_scorers, tmp_path):
    register_scorer("brightness", brightness, label="Brightness")
    file = tmp_path / "scores.csv"
    common = {"scorers": load_scorers(["brightness"]), "store_dir": tmp_path / "store", "scores_file": file}
    values = evaluate_images(Images(), batch_size=2, **common)
    expected = brightness(Images().read(0, 5), PROMPTS).double().numpy()
    assert values["brightness_score"] == pytest.approx(expected.mean())
    assert values["brightness_score_standard_error"] == pytest.approx(expected.std(ddof=1) / np.sqrt(5))
    assert is_higher_better("brightness_score") and is_higher_better("brightness_score_standard_error") is None
    assert [value_label(name) for name in values] == ["Brightness", "Brightness, standard error"]
    rows = file.read_text().splitlines()
    assert rows[0] == "index,prompt,brightness_score" and rows[1].startswith("0,a red fox,") and len(rows) == 6
    assert float(rows[5].rpartition(",")[2]) == pytest.approx(expected[4])


def test_a_file_adds_scorers_and_its_hash_says_which(no_new_scorers, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from diffusers_tread.metrics import register_scorer\n"
        "register_scorer('length', lambda images, prompts: [len(text) for text in prompts], higher_is_better=False)\n"
    )
    for _ in range(2):  # executed once
        load_scorer_file(path)
    (scorer,) = load_scorers(["length"])
    assert scorer(Images().read(0, 5), PROMPTS).flatten().tolist() == [len(prompt) for prompt in PROMPTS]
    assert not SCORERS["length"].higher_is_better and len(scorer.description["file_sha256"]) == 64


def test_what_cannot_be_scored_is_refused(no_new_scorers, clip, extractor, tmp_path):
    with pytest.raises(ValueError, match=r"scorers among \['clip'\], got \['blip'\]"):
        load_scorers(["clip", "blip"])
    with pytest.raises(ValueError, match="each scorer once"):
        load_scorers(["clip", "clip"], clip_model=str(clip))
    with pytest.raises(ValueError, match="CLIP with safetensors"):
        load_scorers(["clip"], clip_model=str(tmp_path))
    with pytest.raises(ValueError, match="new name"):
        register_scorer("clip", brightness)
    (tmp_path / "none.py").write_text("")
    for name, message in {"none.py": "adds scorers", "missing.py": "Check the path"}.items():
        with pytest.raises(ValueError, match=message):
            load_scorer_file(tmp_path / name)

    register_scorer("wide", lambda images, prompts: torch.zeros(len(prompts), 2))
    register_scorer("nan", lambda images, prompts: torch.full((len(prompts),), torch.nan))
    for name, message in {"wide": r"one per image, got \(2, 2\)", "nan": r"'nan_score' of images \[0, 1\]"}.items():
        with pytest.raises(ValueError, match=message):
            evaluate_images(Images(), batch_size=2, scorers=load_scorers([name]), store_dir=tmp_path / name)
    with pytest.raises(ValueError, match="extractor and a reference, scorers"):
        evaluate_images(Images(), batch_size=2, extractor=extractor, store_dir=tmp_path / "store")
