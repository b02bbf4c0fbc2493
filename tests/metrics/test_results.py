# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch

from diffusers_tread.metrics import EvaluationResults, load_results


def test_results_survive_their_file(tmp_path):
    results = EvaluationResults(
        metrics={"fid": 2.5},
        num_samples=50_000,
        images={"name_or_path": "org/model", "seed": 0},
        feature_extractor={"name": "inception", "fingerprint": "abc"},
        reference={"name": "VIRTUAL_imagenet256_labeled.npz", "sha256": "def"},
        batch_size=64,
    )
    assert results.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results.date.endswith("+00:00") and results.hardware["num_processes"] == 1
    results.save(tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results

    values = json.loads((tmp_path / "results.json").read_text())
    for broken in (values | {"format_version": 2}, values | {"score": 1}, {"metrics": {}}):
        (tmp_path / "results.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="results"):
            load_results(tmp_path / "results.json")
