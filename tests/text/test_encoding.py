# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""`PromptEncoder` against the pipelines' own encoding."""

import copy
import inspect

import pytest
import torch
from tiny_pipelines import PIPELINES

from diffusers_tread.data.latents.text import StoredText
from diffusers_tread.fingerprint import weights_fingerprint
from diffusers_tread.text import LENGTHS, PromptEncoder, load_pipeline, text_identity


CAPTIONS = ["a red square", "a blue square", ""]


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def pipeline(request, tmp_path_factory):
    pipeline = PIPELINES[request.param](tmp_path_factory.mktemp("parts"))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


@torch.no_grad()
def own_encoding(pipeline, captions):
    if hasattr(pipeline, "text_encoder_3"):
        return pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False, max_sequence_length=256)
    if hasattr(pipeline, "text_encoder_2"):
        return pipeline.encode_prompt(captions, None, max_sequence_length=512)
    return pipeline.encode_prompt(captions, do_classifier_free_guidance=False)


def assert_equal(given, expected):
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert one is None and other is None or torch.equal(one, other)


def test_a_batch_is_encoded_as_the_pipeline_does_and_comes_back_from_its_samples(pipeline, capfd):
    encoder, expected = PromptEncoder(pipeline), own_encoding(pipeline, CAPTIONS)
    capfd.readouterr()
    assert_equal(encoder(CAPTIONS), expected)
    samples = encoder.encode(CAPTIONS)
    assert_equal(encoder.collate(samples, device="cpu"), expected)
    assert "truncated" not in capfd.readouterr().err  # `count_too_long` says it once
    swapped = encoder.collate([samples[1], samples[0]], device="cpu")
    assert torch.equal(swapped[0], expected[0][[1, 0]])


def test_short_captions_are_filled_up_with_zeros(pipeline):
    encoder = PromptEncoder(pipeline)
    long, short = encoder.encode(CAPTIONS[:2])
    short = {name: value[:3] if value.ndim > 1 else value for name, value in short.items()}
    embeds = encoder.collate([long, short], device="cpu")[0]
    assert embeds.shape[1] == long["0"].shape[0]
    assert torch.equal(embeds[1, :3], short["0"]) and not embeds[1, 3:].any()


def test_captions_that_lose_their_end_are_counted(pipeline):
    length = 4 if "PRX" not in type(pipeline).__name__ else None
    encoder = PromptEncoder(pipeline, max_sequence_length=length)
    words = "red blue " * (2 if length else 200)  # T5's stand-in has a token per word, and one for the end
    assert encoder.count_too_long(["red", words, words]) == 2


def test_another_encoder_or_length_is_another_identity(pipeline):
    encoder = PromptEncoder(pipeline)
    before = encoder.identity()
    assert before == PromptEncoder(pipeline).identity()
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).add_(1)
    assert before["text_encoders"] != encoder.identity()["text_encoders"]
    if set(LENGTHS) & set(inspect.signature(pipeline.encode_prompt).parameters):
        assert PromptEncoder(pipeline, max_sequence_length=4).identity()["max_sequence_length"] == 4
    else:  # PRX before diffusers 0.42
        with pytest.raises(ValueError, match="Expected no max_sequence_length"):
            PromptEncoder(pipeline, max_sequence_length=4)


def test_encoders_are_the_same_in_bfloat16_but_not_in_float16(pipeline):
    def identity(*dtypes):
        part = copy.deepcopy(pipeline.text_encoder)
        for dtype in dtypes:
            part.to(dtype)
        return {"text_encoder": weights_fingerprint(part, rounded_to=torch.bfloat16)}

    stored = StoredText(encoder=identity(torch.bfloat16), arrays={"0": {"dtype": "float16", "shape": (None, 2)}},
                        empty={"size": 1, "sha256": ""})  # fmt: skip
    stored.check_encoder(identity())
    with pytest.raises(ValueError, match=r"--mixed_precision fp16\) make them by --text_dtype float16"):
        stored.check_encoder(identity(torch.float16))


def test_no_length_among_the_options_of_the_call_is_none():
    given = {"max_sequence_length": 4, "call_options": {"max_sequence_length": None}}
    assert text_identity(Stub(), **given)["max_sequence_length"] == 4


class Stub:
    """A pipeline with masks as Qwen-Image has them, and with defaults of its call as Sana."""

    device, components = torch.device("cpu"), {}

    def __call__(self, prompt=None, instruction="Enhance:", max_sequence_length=3):
        raise NotImplementedError

    def encode_prompt(self, prompt, device=None, instruction=None, max_sequence_length=9):
        self.asked = instruction, max_sequence_length
        lengths = torch.tensor([len(one.split()) + 1 for one in prompt])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return mask[..., None].float(), None if mask.all() else mask


def test_a_caption_is_encoded_as_by_the_pipelines_own_call():
    pipeline = Stub()
    PromptEncoder(pipeline)(["a red square"])
    assert pipeline.asked == ("Enhance:", 3)
    PromptEncoder(pipeline, max_sequence_length=5)
    assert pipeline.asked == ("Enhance:", 5)


def test_options_of_the_call_reach_the_encoding_and_its_identity():
    pipeline, options = Stub(), {"instruction": "Draw:", "max_sequence_length": 6, "guidance_scale": 3.5}
    encoder = PromptEncoder(pipeline, call_options=options)
    encoder(["a red square"])
    assert pipeline.asked == ("Draw:", 6)
    assert encoder.identity()["call_options"] == {"instruction": "Draw:"}
    assert encoder.identity()["max_sequence_length"] == 6
    assert "call_options" not in PromptEncoder(pipeline, call_options={"guidance_scale": 3.5}).identity()
    PromptEncoder(pipeline, max_sequence_length=6, call_options=options)
    with pytest.raises(ValueError, match=r"one length of captions, got \[5, 6\]"):
        PromptEncoder(pipeline, max_sequence_length=5, call_options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_parts_are_loaded_in_the_precision_that_they_run_in(dtype, tmp_path):
    PIPELINES["sd3"](tmp_path / "tokenizers").save_pretrained(tmp_path / "pipeline")
    dtypes = {"transformer": torch.float32, "vae": torch.float32, "default": dtype}
    parts = {"text_encoder_2": [str(tmp_path / "pipeline"), "text_encoder_2"]}
    pipeline = load_pipeline(str(tmp_path / "pipeline"), parts=parts, dtypes=dtypes)
    found = {name: {one.dtype for one in part.parameters()} for name, part in pipeline.components.items()
             if isinstance(part, torch.nn.Module)}  # fmt: skip
    assert found["transformer"] == found["vae"] == {torch.float32}
    assert found["text_encoder"] == found["text_encoder_2"] == {dtype}
    # T5 overflows in float16: transformers keeps some of its layers.
    kept = [name for name, one in pipeline.text_encoder_3.named_parameters() if one.dtype == torch.float32]
    assert (kept and all(".wo." in name for name in kept)) if dtype == torch.float16 else not kept
    assert all(torch.isfinite(one).all() for one in PromptEncoder(pipeline)(["red"]) if isinstance(one, torch.Tensor))
    if dtype == torch.bfloat16:  # another precision is no other encoder
        whole = load_pipeline(str(tmp_path / "pipeline"))
        assert PromptEncoder(pipeline).identity() == PromptEncoder(whole).identity()


def test_captions_whose_masks_would_be_lost_are_not_stored():
    with pytest.raises(ValueError, match="stored one by one, got Stub"):
        PromptEncoder(Stub()).encode(["a red square", "red"])
