# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""examples/train_text_to_image_tread.py on tiny pipelines with real tokenizers and text encoders, built small."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from runs import call, interrupting, launch
from safetensors.torch import load_file


pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))
import precompute_latents  # noqa: E402
import train_text_to_image_tread  # noqa: E402
from tiny_models import save_extractor, save_noise  # noqa: E402
from tiny_pipelines import PIPELINES  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")
train = partial(call, train_text_to_image_tread)
ROUTES = '[{"start": 1, "end": -3}]'


@pytest.fixture(autouse=True)
def restored(fresh_accelerate):
    yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("photos"), []
    for index in range(6):
        color = ["red", "blue"][index % 2]
        pixels = np.full((20, 24, 3), index * 30, dtype=np.uint8)
        pixels[..., 0 if color == "red" else 2] = 255
        PIL.Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "text": f"a {color} square", "short": color})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of tiny pipelines with random weights."""
    folders = {}
    for name, make in PIPELINES.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name] / "parts").save_pretrained(folders[name])
    return folders


def flags(base, photos, output, **changes):
    """Of a new transformer of the kind that a pipeline has."""
    values = {"pretrained_model_name_or_path": base, "data": f"folder:{photos}", "output_dir": output}
    values |= {"transformer_config_name_or_path": base / "transformer", "resolution": 16, "routes": ROUTES}
    values |= {"train_batch_size": 2, "max_train_steps": 5, "checkpointing_steps": 2, "dense_fraction": 0.2}
    values |= {"learning_rate": 1e-2, "proportion_empty_prompts": 0.3, "ema_decay": 0.5}
    named = {name: value for name, value in (values | changes).items() if value is not None}
    return [str(word) for name, value in named.items() for word in (f"--{name}", value)] + ["--use_ema"]


def weights(run):
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same(run, other):
    assert weights(run).keys() == weights(other).keys()
    assert all(torch.equal(one, weights(other)[name]) for name, one in weights(run).items())


# What a stranger runs, who has diffusers alone.
ALONE = """
import sys
sys.modules["diffusers_tread"] = None
import torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    options = {"use_resolution_binning": False} if "PRX" in type(pipe).__name__ else {}
    options |= {"height": 16, "width": 16, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    image = pipe("a red square", guidance_scale=2.0, output_type="np", **options).images[0]
    image.tofile(f"{folder}/image.bin")
    assert not hasattr(pipe.transformer, "token_router")
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [["flux"], pytest.param(["sd3", "prx"], marks=pytest.mark.long)])
def test_a_killed_run_ends_as_a_plain_pipeline_with_the_same_bits(bases, photos, tmp_path, names):
    plan, entry = [], {"script": "train_text_to_image_tread"}
    kill = {"at": ["train_text_to_image_tread.Trainer.next_batch"], "count": 4}
    bases = {name: bases[name] for name in names}
    for name, base in bases.items():
        whole, parts = (flags(base, photos, tmp_path / name / part) for part in ("whole", "parts"))
        plan += [entry | {"argv": whole}, entry | {"argv": parts, "kill": kill}, entry | {"argv": parts}]
    codes, _ = launch(plan)
    assert codes == [0, -9, 0] * len(bases)
    for name in bases:
        assert_same(tmp_path / name / "whole", tmp_path / name / "parts")

    # The same image here and where this package is not.
    folders = [tmp_path / name / "whole" / "pipeline" for name in bases]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, folders)], check=True, capture_output=True)
    for folder in folders:
        pipe = DiffusionPipeline.from_pretrained(folder)
        options = {"use_resolution_binning": False} if "PRX" in type(pipe).__name__ else {}
        options |= {"height": 16, "width": 16, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        image = pipe("a red square", guidance_scale=2.0, output_type="np", **options).images[0]
        assert np.array_equal(image.ravel(), np.fromfile(folder / "image.bin", dtype=np.float32))


@pytest.mark.long
def test_two_processes_resume_bit_for_bit(bases, photos, tmp_path):
    kill = {"at": ["train_text_to_image_tread.Trainer.next_batch"], "count": 4, "rank": 1}
    plan = []
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        entry = {"script": "train_text_to_image_tread", "processes": 2, "fsdp": fsdp}
        whole, parts = (flags(bases["prx"], photos, tmp_path / name / part) for part in ("whole", "parts"))
        plan += [entry | {"argv": whole}, entry | {"argv": parts, "kill": kill}, entry | {"argv": parts}]
    codes, _ = launch(plan)
    assert codes == [0, -9, 0] * 2
    for name in ("ddp", "fsdp"):
        assert_same(tmp_path / name / "whole", tmp_path / name / "parts")


def test_a_transformer_is_trained_further_from_its_weights(bases, photos, tmp_path):
    base = bases["sd3"]
    changes = {"transformer_config_name_or_path": None, "learning_rate": 1e-9, "max_train_steps": 1, "routes": "none"}
    changes |= {"train_batch_size": 4, "mixed_precision": "bf16"}
    train(*flags(base, photos, tmp_path / "run", **changes), "--log_loss_by_time")
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "run")
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    configs = list((tmp_path / "run" / "pipeline").rglob("*.json"))
    assert configs and not any(str(base) in config.read_text() for config in configs)  # no path of this machine


def test_captions_reach_the_model_but_for_those_that_are_dropped(bases, photos, tmp_path, monkeypatch):
    seen, encode = [], train_text_to_image_tread.PromptEncoder.__call__

    def watch(encoder, captions):
        seen.append(list(captions))
        return encode(encoder, captions)

    monkeypatch.setattr(train_text_to_image_tread.PromptEncoder, "__call__", watch)
    changes = {"max_train_steps": 30, "checkpointing_steps": 30, "caption_column": "text:0.5,short:0.5"}
    train(*flags(bases["prx"], photos, tmp_path / "run", **changes))
    told = [caption for captions in seen if len(captions) == 2 for caption in captions if captions != ["", ""]]
    assert set(told) == {"", "red", "blue", "a red square", "a blue square"}
    captions = [caption for captions in seen[-30:] for caption in captions]
    assert abs(captions.count("") - 0.3 * 60) < 4 * (60 * 0.3 * 0.7) ** 0.5


def test_a_bucket_for_each_shape_and_samples_of_prompts(bases, photos, tmp_path):
    for index in range(3):
        PIL.Image.new("RGB", (40, 20), "red").save(photos / f"wide-{index}.png")
    lines = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    lines += [{"file_name": f"wide-{index}.png", "text": "red", "short": "red"} for index in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"resolution": None, "aspect_ratio_buckets": "16,16;14,28"}
    with pytest.raises(ValueError, match="do not fit each other"):
        train(*flags(bases["sd3"], photos, tmp_path / "run", **changes))
    save_noise(tmp_path / "reference", 9, 16, 32)
    save_extractor(tmp_path / "network")
    changes |= {"aspect_ratio_buckets": "16,32;16,16", "validation_steps": 5, "eval_steps": 5, "eval_num_samples": 7}
    changes |= {"eval_reference": tmp_path / "reference", "eval_prompts": '["red"]', "eval_inference_steps": 1}
    changes |= {"eval_feature_extractor": f"transformers:{tmp_path / 'network'}"}
    changes |= {"validation_prompts": '["a red square"]', "num_validation_images": 1, "validation_inference_steps": 1}
    train(*flags(bases["sd3"], photos, tmp_path / "run", **changes))
    assert (tmp_path / "run" / "samples" / "step-0000005.png").exists()
    assert [record["step"] for record in json.loads((tmp_path / "run" / "metrics.json").read_text())] == [5]
    train(*flags(bases["sd3"], photos, tmp_path / "run", **changes | {"validation_prompts": '["blue"]'}))  # is free


def test_stored_captions_train_as_exactly(bases, photos, tmp_path):
    """On latents with captions and what the encoders made of them, also the empty one."""
    base = bases["sd3"]
    call(
        precompute_latents, "--data", f"folder:{photos}", "--resolution", 16, "--caption_column", "text",
        "--pretrained_vae_name_or_path", base / "vae", "--cache_text_embeddings", "--pretrained_text_pipeline", base,
        "--text_dtype", "float32", "--output_dir", tmp_path / "latents",
    )  # fmt: skip
    changes = {"data": f"latents:{tmp_path / 'latents'}", "resolution": None, "max_train_steps": 4}
    changes |= {"proportion_empty_prompts": 0.5}
    train(*flags(base, photos, tmp_path / "whole", **changes))
    with interrupting(train_text_to_image_tread.Trainer, "next_batch", lambda trainer, micro_step: trainer.step == 3):
        train(*flags(base, photos, tmp_path / "parts", **changes))
    train(*flags(base, photos, tmp_path / "parts", **changes))
    assert_same(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match="text encoder that the captions of these latents were encoded with"):
        train(*flags(base, photos, tmp_path / "other", **changes, max_sequence_length=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "caption"}, "caption column 'caption'.*short.*text"),
        ({"caption_column": "text:0.5,short:0.6"}, "sum to 1"),
        ({"data": "digits:"}, "--data with captions"),
        ({"routes": '[{"start": 2, "end": 7}]'}, "two blocks after the route"),
        ({"validation_steps": 5}, "--validation_prompts, a JSON list"),
        ({"preset": "prx-s"}, "got both"),
        ({"parts": '{"vea": "there"}'}, "vea"),
        ({"parts": '{"vae": "there"}'}, "where they were said to lie"),
        ({"transformer_config_name_or_path": '{"_class_name": "UNet2DModel"}'}, "cannot be trained|among"),
        ({"transformer_config_name_or_path": '{"_class_name": "PRXTransformer2DModel", "dept": 3}'}, "dept"),
        ({"transformer_config_name_or_path": None, "pretrained_model_name_or_path": None}, "none of them"),
        ({"pretrained_model_name_or_path": None}, "--parts|got none for"),
        ({"resolution": 14}, "do not fit each other.*sides"),
        ({"validation_steps": 5, "validation_prompts": '["a", " "]'}, "Expected texts in --validation_prompts"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(bases, photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(*flags(bases["prx"], photos, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_parts_that_do_not_fit_are_refused(bases, photos, tmp_path):
    config = json.loads((bases["prx"] / "transformer" / "config.json").read_text())
    for change in ({"context_in_dim": 48}, {"in_channels": 8}):
        changes = {"transformer_config_name_or_path": json.dumps(config | change)}
        with pytest.raises(ValueError, match="do not fit each other"):
            train(*flags(bases["prx"], photos, tmp_path / "run", **changes))
    pipe = DiffusionPipeline.from_pretrained(bases["sd3"])
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path / "ddim")
    changes = {"transformer_config_name_or_path": None}
    with pytest.raises(ValueError, match="for flow matching.*DDIMScheduler"):
        train(*flags(tmp_path / "ddim", photos, tmp_path / "run", **changes))
    (tmp_path / "ddim" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": []}')
    with pytest.raises(ValueError, match="with a transformer at .*, got 'StableDiffusionPipeline'"):
        train(*flags(tmp_path / "ddim", photos, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
