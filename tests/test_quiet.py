# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What is said is said once, at the line of the user, and of what is wrong it says which."""

import logging
import warnings

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiTTransformer2DModel
from packaging.version import Version

from diffusers_tread import (
    SparseGuidance,
    TokenRoute,
    TREADPipeline,
    TREADTransformer2DModel,
    apply_token_routing,
    quiet,
)
from diffusers_tread.files import find_pipeline
from diffusers_tread.objectives import FlowMatchingObjective
from diffusers_tread.runs.config import TrainConfig
from diffusers_tread.runs.sampling import SamplingConfig, load_pipeline
from diffusers_tread.runs.setup import make_accelerator


TINY_DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "sample_size": 8}
TINY = TINY_DIT | {"num_classes": 3}
SHORT_TAIL = TokenRoute(start=1, end=3)


@pytest.fixture
def model():
    return TREADTransformer2DModel(**TINY, objective="flow").eval()


@pytest.fixture
def said():
    """What diffusers' loggers let through."""
    messages, logger = [], logging.getLogger("diffusers")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def short_tails(recorded):
    return [one for one in recorded if "only two blocks are left" in str(one.message)]


def test_diffusers_says_once_that_guiders_are_experimental_and_nothing_of_empty_lists(said, model, monkeypatch):
    monkeypatch.setattr(quiet._FILTER, "was_said", False)
    for _ in range(2):
        SparseGuidance()
        ClassifierFreeGuidance()
        model.to(torch.float32)
    logging.getLogger("diffusers.models.modeling_utils").warning("another warning")
    assert [quiet.ONCE in message for message in said] == [True, False] and said[1] == "another warning"


@pytest.mark.parametrize(("name", "text"), list(zip(quiet.LOGGERS, (quiet.ONCE, quiet.NEVER), strict=True)))
def test_the_filter_is_still_needed(said, model, name, text):
    """Fails once diffusers does without these warnings: then the filter can go."""
    if text == quiet.NEVER and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip("said since diffusers 0.42")
    logging.getLogger(name).removeFilter(quiet._FILTER)
    try:
        for _ in range(2):
            SparseGuidance()
            model.to(torch.float32)
    finally:
        quiet.quieten_diffusers()
    assert sum(text in message for message in said) == 2


def test_a_short_tail_is_warned_of_at_the_user_s_line_and_not_when_a_saved_model_is_loaded(tmp_path, recwarn):
    model = TREADTransformer2DModel(**TINY, routes=[SHORT_TAIL])
    TREADTransformer2DModel.from_config(model.config)  # by way of diffusers
    apply_token_routing(DiTTransformer2DModel(**TINY_DIT), SHORT_TAIL)
    SHORT_TAIL.resolve(6)
    assert [one.filename for one in short_tails(recwarn)] == [__file__] * 4
    model.save_pretrained(tmp_path)
    TREADTransformer2DModel.from_pretrained(tmp_path)
    assert len(short_tails(recwarn)) == 4


def test_a_run_warns_once_however_often_its_model_is_made(recwarn, fresh_accelerate, tmp_path):
    warnings.resetwarnings()
    make_accelerator(TrainConfig(output_dir=str(tmp_path), preset="S/2"))
    TREADTransformer2DModel(**TINY, routes=[SHORT_TAIL])
    TREADTransformer2DModel(**TINY, routes=[SHORT_TAIL])
    assert len(short_tails(recwarn)) == 1


def test_sparse_guidance_tells_a_model_that_was_not_prepared_of_apply_token_routing():
    remedy = r"DiTTransformer2DModel.*apply_token_routing\(model, TokenRoute\(start=2, end=-4\)\)"
    for use in (SparseGuidance().prepare_models, SparseGuidance().check_denoisers):
        with pytest.raises(ValueError, match=remedy):
            use(DiTTransformer2DModel(**TINY_DIT))


@pytest.mark.parametrize(("labels", "wrong"), [([0, 4], 4), ([-1, 0], -1)])
def test_class_ids_out_of_range_are_named(model, labels, wrong):
    message = rf"class ids in \[0, 3\].*got \[{wrong}\]"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2), class_labels=torch.tensor(labels))
    with pytest.raises(ValueError, match=message):
        TREADPipeline(model, FlowMatchingObjective().scheduler())(labels)


@pytest.mark.parametrize("ids", [[-1, 3], [3, 16]])
def test_ids_of_kept_tokens_out_of_range_are_named_with_their_route(model, ids):
    wrong = ids[0] if ids[0] < 0 else ids[1]
    with pytest.raises(ValueError, match=rf"in \[0, 16\), got \[{wrong}\] for route 0"):
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2), kept_token_ids=[torch.tensor([[0, 1], ids])])


def test_blocks_that_there_are_not_are_named(model):
    with pytest.raises(ValueError, match=r"0 to 5 .*got \[6\]"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), hidden_states_at=[0, 6])
    with pytest.raises(ValueError, match=r"6 blocks \(0 to 5\), got start=2, end=7"):
        TREADTransformer2DModel(**TINY, routes=[TokenRoute(start=2, end=7)])


def test_a_run_s_folder_stands_for_the_pipeline_in_it(model, tmp_path):
    run = tmp_path / "run"
    TREADPipeline(model, FlowMatchingObjective().scheduler()).save_pretrained(run / "pipeline")
    assert find_pipeline(run) == find_pipeline(run / "pipeline") == str(run / "pipeline")
    assert find_pipeline("owner/name") == "owner/name"  # of the Hub
    config = SamplingConfig(pretrained_pipeline=str(run))  # as sample.py and evaluate_tread.py
    assert isinstance(load_pipeline(config, torch.device("cpu")), TREADPipeline)
    (run / "model_index.json").write_text("{}")  # a pipeline with a part of that name
    assert find_pipeline(run) == str(run)
    (tmp_path / "train_config.json").write_text("{}")
    with pytest.raises(ValueError, match="the run is not finished"):
        find_pipeline(tmp_path)


def test_the_bar_of_a_sampling_has_a_name(model, capsys):
    TREADPipeline(model, FlowMatchingObjective().scheduler())(0, num_inference_steps=1, output_type="latent")
    assert "Sampling: 100%" in capsys.readouterr().err
