# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_tread import TREADPipeline, TREADTransformer2DModel
from diffusers_tread.runs import samples


@pytest.mark.parametrize(
    ("num_classes", "num_images", "size", "expected"),
    [
        (0, 3, (3, 1), {}),
        (2, 3, (3, 1), {"columns": ["no 0", "no 1", "no 0"]}),
        (3, 20, (9, 3), {"columns": ["no 0", "no 1", "no 2"] * 3}),
        (12, 4, (4, 1), {"columns": ["no 0", "no 1", "no 2", "no 3"]}),
        (12, 21, (10, 3), {"rows": ["no 0 to no 9", "no 10 to no 7", "no 8"]}),
    ],
)
def test_a_grid_says_the_classes_of_its_columns_or_rows(monkeypatch, num_classes, num_images, size, expected):
    seen, add_labels = {}, samples.add_labels
    monkeypatch.setattr(samples, "add_labels", lambda grid, **texts: seen.update(texts) or add_labels(grid, **texts))
    tiny = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4, "sample_size": 8}
    model = TREADTransformer2DModel(**tiny, in_channels=1, num_classes=num_classes, objective="flow", routes=None)
    id2label = {label: f"no {label}" for label in range(num_classes)}
    pipeline = TREADPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=id2label)
    options = {"seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0}
    grid = samples.sample_grid(pipeline, num_images=num_images, **options)
    assert seen == expected
    assert grid.height == 66 * size[1] + 22 * ("columns" in expected)
    assert grid.width == 66 * size[0] if "rows" not in expected else grid.width > 66 * size[0]
