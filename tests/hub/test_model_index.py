# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Folders that would run code, or load what nobody asked for, are refused before anything of them is loaded."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_tread import TREADPipeline
from diffusers_tread.converters import convert_diffusers_dit


sys.path.insert(0, str(Path(__file__).parent))
from tiny_pipeline import make_pipeline  # noqa: E402


CODE = "import pathlib\npathlib.Path({!r}).touch()\nfrom diffusers import DDIMScheduler as Evil\n"
# Entries for the scheduler, and the files that would be run for them.
ENTRIES = [
    (["evil", "Evil"], "scheduler/evil.py"),
    (["os", "Evil"], "scheduler/os.py"),
    (["evil.nested", "Evil"], "scheduler/evil.nested.py"),
    (["../scheduler/evil", "Evil"], "scheduler/evil.py"),
    (["diffusers", "DDIMScheduler"], "scheduler/diffusers.py"),
    (["transformers", "Evil"], "scheduler/transformers.py"),
    (["diffusers_tread", "EDMHeunScheduler"], "scheduler/diffusers_tread.hub.loadable.py"),
    (["diffusers_tread", "EDMHeunScheduler"], "None.py"),
    # Pipelines have a model_index.json of their own.
    (["diffusers", "DiffusionPipeline"], "scheduler/evil.py"),
    (["diffusers", "AutoModel"], "scheduler/evil.py"),
    (["diffusers", "utils"], "scheduler/evil.py"),
    (["diffusers.schedulers", "DDIMScheduler"], "scheduler/evil.py"),
    (["transformers", "models.evil"], "scheduler/evil.py"),
    # No entries at all.
    *[(entry, "scheduler/evil.py") for entry in (None, 5, "evil", {"evil": "Evil"}, True, 1.5)],
    *[(entry, "scheduler/evil.py") for entry in ([], ["evil"], [None, None], [None, "Evil"], ["evil", None], [1, 2])],
    (["evil", "Evil", "Evil"], "scheduler/evil.py"),
    ([["evil"], "Evil"], "scheduler/evil.py"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, of which the weights are links."""
    for path in saved.rglob("*.*"):
        copy = tmp_path / "pipeline" / path.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path) if path.suffix == ".safetensors" else copy.write_bytes(path.read_bytes())
    return tmp_path / "pipeline"


def plant(folder, file):
    """Writes a file that leaves a mark when it is run."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(CODE.format(str(folder / "RAN")))


def change(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(("entry", "file"), ENTRIES)
def test_an_entry_that_would_run_code_or_is_none_is_refused(folder, entry, file):
    plant(folder, file)
    change(folder, scheduler=entry)
    with pytest.raises(ValueError, match="Expected (components of diffusers, transformers|a folder without code)"):
        TREADPipeline.from_pretrained(folder)
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("name", ["vae", "guider", "stranger", "../pipeline", "sched/uler", "."])
def test_so_is_any_other_component(folder, name):
    plant(folder, f"{name}/evil.py")
    change(folder, **{name: ["evil", "Evil"]})
    with pytest.raises(ValueError, match="Nothing of it was run"):
        TREADPipeline.from_pretrained(folder)
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("name", [["pipeline", "Evil", 3], [], 5, None, {"pipeline": "Evil"}])
def test_a_pipeline_s_class_that_is_none_is_refused(folder, name):
    plant(folder, "pipeline.py")
    change(folder, _class_name=name)
    with pytest.raises(ValueError, match="got '_class_name'"):
        TREADPipeline.from_pretrained(folder)
    assert not (folder / "RAN").exists()


def test_code_that_nothing_names_is_neither_run_nor_refused(folder):
    for file in ("pipeline.py", "scheduler/scheduling_edm_heun.py", "scheduler/evil.py", "transformer/evil.py"):
        plant(folder, file)
    change(folder, _class_name=["pipeline", "TREADPipeline"], vae=[None, None], guider=[None, None])
    assert isinstance(TREADPipeline.from_pretrained(folder), TREADPipeline)
    assert not (folder / "RAN").exists()


def test_a_bin_is_read_only_if_it_is_asked_for(tmp_path):
    make_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        TREADPipeline.from_pretrained(tmp_path)
    assert isinstance(TREADPipeline.from_pretrained(tmp_path, use_safetensors=False), TREADPipeline)


# diffusers' DiT, whose folders the converter reads by diffusers' own pipeline.


@pytest.fixture(scope="module")
def saved_dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    transformer = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=3)
    vae = AutoencoderKL(block_out_channels=[4], norm_num_groups=4, latent_channels=4)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def dit_folder(saved_dit, tmp_path):
    return Path(shutil.copytree(saved_dit, tmp_path / "dit"))


@pytest.mark.parametrize(("entry", "file"), [ENTRIES[index] for index in (0, 1, 4, 8, 13, 20)])
def test_a_diffusers_folder_with_code_is_not_converted(dit_folder, entry, file):
    plant(dit_folder, file)
    change(dit_folder, scheduler=entry)
    with pytest.raises(ValueError, match="Nothing of it was run"):
        convert_diffusers_dit(dit_folder)
    assert not (dit_folder / "RAN").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 10**9), ("num_layers", -1), ("sample_size", 10**6), ("patch_size", 2.0), ("in_channels", "4")],
)
def test_absurd_sizes_in_a_diffusers_folder_are_refused_at_once(dit_folder, name, value):
    path = dit_folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"Expected {name} from 1 to"):
        convert_diffusers_dit(dit_folder)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_with_the_learned_variances_goes_the_setting_that_wants_them(dit_folder, kind, caplog):
    DDPMScheduler(variance_type=kind, beta_schedule="squaredcos_cap_v2").save_pretrained(dit_folder / "scheduler")
    change(dit_folder, scheduler=["diffusers", "DDPMScheduler"])
    config = convert_diffusers_dit(dit_folder).scheduler.config
    assert (config.variance_type, config.beta_schedule) == ("fixed_small", "squaredcos_cap_v2")
    assert kind in caplog.text
