# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The table of a sweep."""

import json
import math

import pytest

from diffusers_tread.runs.sweep import write_sweep


def rows_of(*values):
    points = [(f"scale-{place}", {"guidance_scale": place}, {"fid": fid}) for place, fid in enumerate(values)]
    return [dict(zip(("name", "values", "metrics"), point, strict=True)) for point in points]


@pytest.mark.parametrize(
    ("values", "best"), [((math.nan, 3.0, 2.0, -math.inf), "scale-2"), ((math.nan, math.inf), None)]
)
def test_a_value_that_is_not_finite_is_never_the_best(tmp_path, values, best):
    text = write_sweep(tmp_path, rows_of(*values), num_points=4, sample="50,000 samples, seed 0")
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] == best
    assert ("none is finite" in text) == (best is None) and text.count("(best)") == (best is not None)
    assert (tmp_path / "sweep.png").exists()
