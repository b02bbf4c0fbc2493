# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""`RatioSchedule` against its formula written the other way round."""

import dataclasses
import json

import numpy as np
import pytest

from diffusers_tread import RatioSchedule
from diffusers_tread.guiders.ratio_schedule import as_schedule


PROGRESS = np.linspace(0.0, 1.0, 41)


@pytest.mark.parametrize("first, last", [(0.6, 0.0), (0.0, 0.6), (0.2, 0.9), (0.3, 0.3)])
def test_the_shapes_are_half_a_cosine_and_a_line(first, last):
    cosine = [RatioSchedule(first=first, last=last).at(progress) for progress in PROGRESS]
    linear = [RatioSchedule(first=first, last=last, shape="linear").at(progress) for progress in PROGRESS]
    expected = (first + last) / 2 + (first - last) / 2 * np.cos(np.pi * PROGRESS)
    np.testing.assert_allclose(cosine, expected, atol=1e-12)
    np.testing.assert_allclose(linear, np.interp(PROGRESS, [0, 1], [first, last]), atol=1e-12)
    assert (cosine[0], cosine[-1], linear[0], linear[-1]) == (first, last, first, last)  # to the bit: 0.0 is dense


def test_exchanged_ends_are_the_inverse_of_sg_fid():
    # arXiv 2601.01608: one branch at gamma, which falls from 0.6 to 0, the other at 0.6 - gamma.
    for shape in ("cosine", "linear"):
        falling = RatioSchedule(first=0.6, last=0.0, shape=shape)
        rising = RatioSchedule(first=0.0, last=0.6, shape=shape)
        for progress in PROGRESS:
            assert rising.at(progress) == pytest.approx(0.6 - falling.at(progress), abs=1e-12)


def test_a_mapping_from_json_gives_the_schedule_back():
    schedule = RatioSchedule(first=0.1, last=0.8, shape="linear")
    assert as_schedule(json.loads(json.dumps(schedule.to_dict()))) == as_schedule(schedule) == schedule
    assert as_schedule({"first": 0.1, "last": 0.8}).shape == "cosine"
    assert [as_schedule(0.3).at(progress) for progress in PROGRESS] == pytest.approx([0.3] * 41, abs=1e-15)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RatioSchedule(first=0.1, last=0.8).last = 0.9


@pytest.mark.parametrize(
    "value, message",
    [
        ({"first": 0.1}, "mapping with the keys.*got {'first': 0.1}"),
        ({"first": 0.1, "last": 0.2, "end": 3}, "mapping with the keys"),
        ({"first": 0.1, "last": 1.0}, r"in \[0, 1\).*got 1.0"),
        ({"first": -0.1, "last": 0.5}, r"in \[0, 1\).*got -0.1"),
        ({"first": 0.1, "last": 0.5, "shape": "step"}, "'cosine' or 'linear', got 'step'"),
        (1.0, r"in \[0, 1\).*got 1.0"),
        ("cosine", r"in \[0, 1\).*got 'cosine'"),
        (None, r"in \[0, 1\).*got None"),
    ],
    ids=str,
)
def test_what_is_no_ratio_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        as_schedule(value)
