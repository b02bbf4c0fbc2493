# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The script works and says per image what it measured; how fast a machine is, no test can claim."""

import json

import scan_cost
import torch


def test_a_row_has_attention_and_each_scan_per_image(tmp_path):
    threads, path = torch.get_num_threads(), tmp_path / "scan.json"
    flags = ["--threads", "1", "--shapes", "2x16", "--width", "64", "--chunk_sizes", "default,8", "--repeats", "2"]
    try:
        scan_cost.main([*flags, "--output", str(path)])
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads(path.read_text())["rows"]
    lines = scan_cost.table({"rows": [row]}).splitlines()
    assert lines[2].startswith("| 2 x 16 | ") and {line.count("|") for line in lines} == {7}
    assert (row["batch_size"], row["num_tokens"]) == (2, 16)
    assert row["milliseconds_per_image"].keys() == {"attention", "scan_default", "scan_8"}
    assert all(times["min"] > 0 for times in row["milliseconds_per_image"].values())
