# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import json

import profile_step
import pytest


TINY = ["--preset", "S/8", "--tokens", "16", "--batch_size", "2", "--repeats", "2"]


@pytest.fixture(scope="module")
def report(tmp_path_factory, small_s):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    report = profile_step.main([*TINY, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    return report


def test_every_operation_is_of_one_kind_and_the_shares_are_of_all(report):
    rows = {row["kind"]: row for row in report["rows"]}
    for kind in ("dense", "routed"):
        assert sum(row[f"{kind}_share"] for row in rows.values()) == pytest.approx(1.0)
        total = rows["linear layers"][f"{kind}_seconds"] / rows["linear layers"][f"{kind}_share"]
        # The report keeps the longest operations by name.
        assert 0 < sum(report["operations"][kind].values()) <= total * (1 + 1e-9)


def test_the_operations_are_found_where_they_run(report):
    rows = {row["kind"]: row for row in report["rows"]}
    assert {"linear layers", "attention", "optimiser", "moving tokens", "activation", "layer norm"} <= set(rows)
    assert rows["moving tokens"]["routed_seconds"] > 0
    assert not [name for name in report["operations"]["dense"] if name.startswith(("aten::topk", "aten::index_copy"))]
    assert profile_step.kind_of("aten::addmm") == profile_step.kind_of("aten::mm") == "linear layers"
    assert profile_step.kind_of("aten::native_layer_norm_backward") == "layer norm"
    assert profile_step.kind_of("triton_poi_fused_add_0") == "fused kernels"
    assert profile_step.kind_of("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN") == "linear layers"
    assert profile_step.kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26") == "attention"
    assert profile_step.kind_of("void cudnn::fusion::compute_dot_do_o<true>(void const*, int)") == "attention"
    assert profile_step.kind_of("void at::native::indexFuncLargeIndex<float, long>") == "moving tokens"


def test_operations_in_which_no_token_takes_part_are_told_by_their_shapes(report):
    args = profile_step.parse_args([*TINY, "--batch_size", "4"])  # 4 images of 16 or 8 tokens
    for shapes in ([[64, 48], [48, 96]], [[4, 8, 48]], [[4, 2, 16, 16]], [[96, 48], [48]], []):
        assert profile_step.has_tokens(shapes, 8, args) == (shapes != [[96, 48], [48]])
    assert not profile_step.has_tokens([[4, 48], [288, 48]], 8, args)  # the modulation: a row per image
    rows = {row["kind"]: row for row in report["rows"]}
    assert rows["without tokens"]["dense_seconds"] > 0


def test_the_ceiling_that_counts_weights_lies_between_none_and_that_of_the_flops(report):
    assert 1 < report["ceiling_with_weights"] < report["flop_ceiling"]
    rows = [{"kind": "optimiser", "dense_seconds": 1.0}, {"kind": "attention", "dense_seconds": 3.0}]
    assert profile_step.ceiling_with_weights(rows, 1.5) == pytest.approx(4 / 3)
    assert profile_step.ceiling_with_weights(rows[1:], 1.5) == pytest.approx(1.5)


def test_the_table_ends_with_the_ratio_of_all_and_that_of_steps_without_the_profiler(report):
    lines = profile_step.table(report).splitlines()
    assert len(lines) == 4 + len(report["rows"]) and lines[-2].startswith("| all |")
    assert f"FLOPs: {report['flop_ceiling']:.2f}" in lines[-2]
    assert f"of the {report['ceiling_with_weights']:.2f} that weights and FLOPs allow" in lines[-1]
    before = {name: value for name, value in report.items() if name != "ceiling_with_weights"}
    assert profile_step.table(before).splitlines() == lines[:-1]  # a GPU's, whose kernels have no shapes
