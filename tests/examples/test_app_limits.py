# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the page does not do, whoever asks and in whatever way."""

import importlib
import importlib.util
import threading
import time
from pathlib import Path

import pytest
import torch

from diffusers_tread import FlowMatchingObjective, TREADPipeline, TREADTransformer2DModel


if importlib.util.find_spec("gradio") is None:
    pytest.skip("needs gradio: pip install 'diffusers-tread[app]'", allow_module_level=True)

NAN, INF = float("nan"), float("inf")
GOOD = {"label": 1, "seed": 1, "num_images": 1, "sampler": "FlowMatchEulerDiscreteScheduler", "steps": 2}
GOOD |= {"cfg_scale": 1.5, "kind": "Sparse Guidance", "scale": 1.4, "strong_ratio": 0.2, "weak_ratio": 0.8}


@pytest.fixture
def app(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("app")


@pytest.fixture
def pipeline():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "in_channels": 3, "sample_size": 8}
    pipeline = TREADPipeline(
        TREADTransformer2DModel(**sizes, num_classes=3, objective="flow"), FlowMatchingObjective().scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("seed", "num_images", "steps", "label") for value in (NAN, INF, -1, 1e300, 0.5)],
        *[(name, value) for name in ("seed", "steps") for value in (None, "7", True, [1], 10**400)],
        *[(name, value) for name in ("cfg_scale", "scale", "weak_ratio") for value in (NAN, -INF, -1, 1e9, None, "1")],
        ("num_images", 17),
        ("steps", 251),
        ("label", 3),
        ("strong_ratio", 0.9),
        *[("rescale", value) for value in (NAN, 1.5, None)],
        *[("high", value) for value in (NAN, 0, 1e9)],
        *[("sampler", value) for value in ("DDIMScheduler", "DiffusionPipeline", "os", None, 5)],
        *[("kind", value) for value in ("autoguidance", "other", None, 5, ["none"])],
    ],
)
def test_a_value_out_of_range_is_refused_before_any_work(app, pipeline, monkeypatch, name, value):
    monkeypatch.setattr(app, "sample", lambda *args, **options: pytest.fail("it sampled"))
    with pytest.raises(app.gr.Error, match="Expected "):
        app.compare(pipeline, **GOOD | {name: value})


def test_requests_wait_for_each_other(app, pipeline, monkeypatch):
    running, most, sample = [], [], app.sample

    def watched(*args, **options):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        result = sample(*args, **options)
        running.pop()
        return result

    monkeypatch.setattr(app, "sample", watched)
    threads = [threading.Thread(target=app.compare, args=(pipeline,), kwargs=GOOD) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 6 and max(most) == 1


def test_the_queue_is_short_and_closed_to_programs_and_nothing_is_uploaded(app, pipeline, monkeypatch):
    page = app.build_page(pipeline)
    assert page.api_open is False and page.max_threads
    assert all(function.api_visibility == "private" for function in page.fns.values())
    assert page._queue.max_size == 32

    options = {}
    monkeypatch.setattr(app, "load_pipeline", lambda name: pipeline)
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda self, **given: options.update(given))
    app.main(["pipeline"])
    assert options["max_file_size"] == "1kb"


def test_a_model_without_classes_has_a_page(app):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "in_channels": 3, "sample_size": 8}
    model = TREADTransformer2DModel(**sizes, num_classes=0, objective="flow")
    pipeline = TREADPipeline(model, FlowMatchingObjective().scheduler())
    app.build_page(pipeline)
    assert app.compare(pipeline, **GOOD | {"label": 0})[0].size == (66, 66)


def test_a_broken_model_is_an_error_on_the_page(app, pipeline):
    pipeline.transformer.proj_out.bias.data[0] = torch.nan
    with pytest.raises(app.gr.Error, match="Expected finite samples"):
        app.compare(pipeline, **GOOD)


def test_an_interval_and_rescaling_change_the_right_side_alone(app, pipeline):
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    settings = GOOD | {"kind": "classifier-free", "scale": 3.0, "steps": 4}
    left, cost, right, full = app.compare(pipeline, **settings)
    same_left, same_cost, inside, less = app.compare(pipeline, **settings, low=0.3, high=0.7)
    assert "100%" in cost and "100%" in full and "100%" in same_cost and "75%" in less  # two of four calls are guided
    pictures = [
        picture.tobytes() for picture in (left, right, inside, app.compare(pipeline, **settings, rescale=1)[2])
    ]
    assert same_left.tobytes() == left.tobytes() and len(set(pictures)) == 4
