# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and counts what the alignment adds."""

import pytest


pytest.importorskip("transformers")


@pytest.mark.long
def test_the_alignment_adds_the_flops_of_encoder_and_projector(small_s):
    import alignment_step

    flags = "--preset S/8 --tokens 4 --batch_size 1 --encoders tiny --repeats 2 --warmup 0"
    rows = alignment_step.main(flags.split())["rows"]
    share = {(row["encoder"], row["kind"]): row["flops_over_bare"] for row in rows}
    assert share["bare", "routed"] == share["bare", "dense"] == 1.0
    assert 1 < share["ended", "dense"] < share["tiny", "dense"]
    assert share["ended", "routed"] < share["ended", "dense"]  # of half the tokens
    assert share["stored", "routed"] == share["ended", "routed"] and share["conv", "dense"] > 1
    with pytest.raises(ValueError, match="Expected --encoders among"):
        alignment_step.main(["--encoders", "huge"])
