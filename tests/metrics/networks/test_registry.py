# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import pytest

from diffusers_tread.metrics import load_feature_extractor


def test_no_network_s_library_is_needed_before_the_network_is():
    absent = ["cleanfid", "datasets", "peft", "timm", "torch_fidelity", "torchvision", "transformers"]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import diffusers_tread.metrics"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    weights = tmp_path / "inception-2015-12-05.pt"
    weights.touch()
    for module, spec in (
        ("torch_fidelity.feature_extractor_inceptionv3", "inception"),
        ("cleanfid.resize", "clean-fid:clean"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match="Do `pip install --no-deps clean-fid torch-fidelity`"):
            load_feature_extractor(spec, weights=weights)


@pytest.mark.parametrize("spec", ["", "vgg", "inception:v3", "timm", "timm:", "transformers:", "clean-fid"])
def test_an_unknown_spec_is_refused(spec):
    with pytest.raises(ValueError, match='Expected "inception", "clean-fid:clean"'):
        load_feature_extractor(spec)


def test_an_unknown_mode_of_clean_fid_and_missing_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match='Expected "clean" or "legacy_tensorflow" of clean-fid'):
        load_feature_extractor("clean-fid:legacy_pytorch")
    with pytest.raises(ValueError, match="Expected a file with the weights of inception, got no file"):
        load_feature_extractor("inception", weights=tmp_path / "missing.pth")
