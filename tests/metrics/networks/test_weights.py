# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import pickle

import pytest
import torch

from diffusers_tread.metrics import load_feature_extractor


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(torch_fidelity, tmp_path, capfd, write):
    path = tmp_path / "weights.pth"
    write({"fc.bias": Payload()}, path)
    with pytest.raises(ValueError, match="Expected a state dict of tensors in .*weights.pth"):
        load_feature_extractor("inception", weights=path)
    assert "this must not run" not in capfd.readouterr().out
