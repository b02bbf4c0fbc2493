# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Pipelines on the Hub: trained, pushed, and loaded by processes with and without the package."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import make_pipeline, same, sample

from diffusers_tread import TREADPipeline
from diffusers_tread.hub.model_card import TRAINING_SETTINGS
from diffusers_tread.runs.presets import parse_train_config


HERE = Path(__file__).parent
TRAIN = [
    *("--max_train_steps", "4", "--train_batch_size", "4", "--checkpointing_steps", "4", "--validation_steps", "2"),
    *("--num_validation_images", "4", "--validation_inference_steps", "2", "--model_config_name_or_path"),
    '{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "patch_size": 2}',
]
PUSH = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from tiny_pipeline import make_pipeline
    print("URL", make_pipeline().push_to_hub(sys.argv[2], private=True, commit_message="First"))
"""
# A process in which the package cannot be imported: samples of each repository or folder, as diffusers loads it.
WITHOUT_THE_PACKAGE = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_tread":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import snapshot_download

torch.set_num_threads(1)
try:
    import diffusers_tread
except ModuleNotFoundError as error:
    print(error)

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe([3, 0], num_inference_steps=3, generator=generators, output_type="np").images

names, output, readme = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
try:
    DiffusionPipeline.from_pretrained(names[0])
except ValueError as error:
    print(error)
first, *_ = pipes = [DiffusionPipeline.from_pretrained(name, trust_remote_code=True) for name in [*names, names[0]]]
images = [sample(pipe) for pipe in pipes]
assert np.array_equal(sample(first), images[0]), "a later pipeline with code of its own changed an earlier one"
np.savez(output, *images)

for snippet in json.loads(readme):
    exec(snippet, scope := {})
    print("ran", sorted(scope))
assert torch.equal(scope["transformer"].proj_out.weight, pipes[1].transformer.proj_out.weight)
print("modules of the package:", [name for name in sys.modules if name.startswith("diffusers_tread")])
"""


@pytest.fixture(scope="module")
def pushed(hub_client):
    """The tiny pipeline as "ant/tiny"."""
    return hub_client.run(PUSH, HERE, "ant/tiny").output


@pytest.fixture(scope="module")
def trained(run_example, tmp_path_factory):
    """The folder of a run on the digits that pushed to "ant/digits" every two steps, and its output."""
    folder = tmp_path_factory.mktemp("digits")
    push = ("--push_to_hub", "--hub_model_id", "ant/digits", "--hub_push_steps", 2)
    return folder, run_example("train_tread", [*TRAIN, "--output_dir", folder, *push]).output


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_a_trained_model_gives_the_same_images_without_the_package(hub_server, pushed, trained, tmp_path):
    folder, _ = trained
    codes = [code for code in snippets(hub_server.files("ant/digits")["README.md"].decode()) if "TREADP" not in code]
    assert len(codes) == 2
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    environment |= {"HF_TOKEN": "hf_ant", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, json.dumps(["ant/tiny", "ant/digits", str(folder / "hub")]),
         "images.npz", json.dumps(codes)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "No module named 'diffusers_tread'" in result.stdout and "modules of the package: []" in result.stdout
    assert "trust_remote_code=True" in result.stdout and result.stdout.count("ran [") == 2
    assert not re.search("were passed to|might require|Expected types", result.stderr), result.stderr

    images = np.load(tmp_path / "images.npz")
    tiny, digits = sample(make_pipeline()), sample(TREADPipeline.from_pretrained(folder / "pipeline"))
    for index, expected in enumerate((tiny, digits, digits, tiny)):
        assert same(images[f"arr_{index}"], expected), index
    assert tiny.std() > 0.01 and digits.std() > 0.01 and (tmp_path / "sample.png").stat().st_size > 0


def test_the_package_loads_from_the_hub_without_trust(hub_server, hub_client, pushed, trained, tmp_path):
    (code,) = [code for code in snippets(hub_server.files("ant/digits")["README.md"].decode()) if "TREADP" in code]
    # Whoever ran the code of the repository would notice.
    repo = hub_server.repo("ant/tiny")
    files = dict(repo.at("main").files)
    changed = {path: hub_server.store(path, b"raise SystemExit(9)") for path in files if path.endswith(".py")}
    assert len(changed) == 5 and repo.private
    repo.commit("main", "Hostile", files | changed)
    hub_client.run(
        """
        import os, sys
        from pathlib import Path
        import numpy as np
        import torch
        from huggingface_hub import ModelCard

        sys.path.insert(0, sys.argv[1])
        os.chdir(sys.argv[2])
        from tiny_pipeline import make_pipeline, same, sample
        from diffusers_tread import EDMHeunScheduler, SparseGuidance, TREADPipeline, TREADTransformer2DModel

        def parts(folder):
            return sorted(f"{path.parent.name}/{path.name}" for path in Path(folder).rglob("*.*") if path.is_file())

        # All, without code; the transformer alone; what is given is not downloaded.
        expected = sample(make_pipeline())
        pipe = TREADPipeline.from_pretrained("ant/tiny", cache_dir="all")
        assert same(sample(pipe), expected)
        assert type(pipe.guider) is SparseGuidance and type(pipe.scheduler) is EDMHeunScheduler
        alone = TREADTransformer2DModel.from_pretrained("ant/tiny", subfolder="transformer")
        assert torch.equal(alone.proj_out.weight, pipe.transformer.proj_out.weight)
        assert parts("all") and not [name for name in parts("all") if name.endswith((".py", ".md"))]
        given = {"vae": None, "guidance_transformer": alone}
        assert TREADPipeline.from_pretrained("ant/tiny", cache_dir="some", **given).guidance_transformer is alone
        assert "vae/config.json" in parts("all") and "transformer/config.json" in parts("some")
        assert not [name for name in parts("some") if name.startswith(("vae", "guidance"))]

        # A variant beside the weights, which the VAE is without.
        pipe.vae = None
        pipe.transformer.proj_out.weight.data.mul_(2)
        pipe.push_to_hub("ant/tiny", variant="fp16")
        make_pipeline().vae.push_to_hub("ant/tiny", subfolder="vae")
        half = TREADPipeline.from_pretrained("ant/tiny", variant="fp16", cache_dir="half", vae=None)
        assert torch.equal(half.transformer.proj_out.weight, pipe.transformer.proj_out.weight)
        weights = "transformer/diffusion_pytorch_model{}.safetensors"
        assert weights.format(".fp16") in parts("half") and weights.format("") not in parts("half")
        plain = TREADPipeline.from_pretrained("ant/tiny", cache_dir="plain")
        assert torch.equal(plain.transformer.proj_out.weight, alone.proj_out.weight)
        assert weights.format("") in parts("plain") and weights.format(".fp16") not in parts("plain")

        # A branch.
        pipe.push_to_hub("ant/tiny", revision="doubled")
        doubled = TREADPipeline.from_pretrained("ant/tiny", revision="doubled")
        assert torch.equal(doubled.transformer.proj_out.weight, pipe.transformer.proj_out.weight)
        assert not torch.equal(doubled.transformer.proj_out.weight, alone.proj_out.weight)

        # From the cache, with the Hub away; and the snippet of the other repository.
        again = TREADPipeline.from_pretrained("ant/tiny", cache_dir="plain", local_files_only=True)
        assert torch.equal(again.transformer.proj_out.weight, alone.proj_out.weight)
        assert ModelCard.load("ant/digits").data.library_name == "diffusers"

        # What diffusers itself pushes loads too.
        plain.save_pretrained("plain-folder", push_to_hub=True, repo_id="ant/plain")
        assert same(sample(TREADPipeline.from_pretrained("ant/plain")), sample(plain))
        exec(sys.argv[3])
        """,
        HERE,
        tmp_path,
        code,
    )
    assert (tmp_path / "sample.png").stat().st_size > 0


def test_training_pushes_meanwhile_and_at_its_end(hub_server, trained):
    folder, _ = trained
    commits = {commit.title: commit for commit in hub_server.repo("ant/digits").commits}
    # An upload that is slower than two steps lets the next push out, but never the last one.
    assert {"initial commit", "Step 4"} <= set(commits) <= {"initial commit", "Step 2", "Step 4"}
    pushed = {path: hub_server.objects[file.sha256] for path, file in commits["Step 4"].files.items()}
    del pushed[".gitattributes"]
    hub = folder / "hub"
    assert pushed == {path.relative_to(hub).as_posix(): path.read_bytes() for path in hub.rglob("*.*")}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert pushed[weights] == (folder / "pipeline" / weights).read_bytes()
    card = pushed["README.md"].decode()
    assert "| trained on | scikit-learn's digits |" in card
    assert "![Samples](samples.png)" in card and "| optimiser steps | 4 |" in card and "goes on" not in card
    assert set(TRAINING_SETTINGS) - {"proportion_empty_prompts"} <= set(
        json.loads((folder / "train_config.json").read_text())
    )
    if "Step 2" in commits:
        card = hub_server.objects[commits["Step 2"].files["README.md"].sha256].decode()
        assert "2 optimiser steps of a training that goes on" in card


def test_a_failed_push_costs_neither_the_run_nor_what_it_saved(hub_server, run_example, trained, tmp_path):
    line = [*TRAIN, "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "ant/refused"]
    hub_server.fail("preupload", times=99, status=413)
    result = run_example("train_tread", [*line, "--hub_push_steps", 1])
    assert "Failed to push 'Step 4'" in result.output and "upload_folder(" in result.output
    weights = "transformer/diffusion_pytorch_model.safetensors"
    expected = (trained[0] / "pipeline" / weights).read_bytes()
    assert (tmp_path / "run/pipeline" / weights).read_bytes() == expected
    assert (tmp_path / "run/checkpoint-4/manifest.json").exists()
    assert list(hub_server.files("ant/refused")) == [".gitattributes"]

    # The same command pushes it.
    hub_server.reset()
    run_example("train_tread", line)
    assert hub_server.files("ant/refused")[weights] == expected


def test_a_token_that_may_not_write_is_named_before_training(hub_server, run_example, tmp_path):
    line = [*TRAIN, "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "bee/theirs"]
    result = run_example("train_tread", line, check=False)
    assert result.returncode == 1 and "Expected a token that may write to bee/theirs" in result.output
    assert not (tmp_path / "run").exists()


def test_pushes_take_turns_and_do_not_wait(hub_server, hub_client, repo_id, tmp_path):
    def hold(request):
        while "preupload" in request and not (tmp_path / "go").exists():
            time.sleep(0.01)

    hub_server.on_answer = hold
    result = hub_client.run(
        """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from tiny_pipeline import make_pipeline
        from diffusers_tread.hub import BackgroundPush, CardDetails

        pipeline, folder = make_pipeline(), Path(sys.argv[3])
        push = BackgroundPush(sys.argv[2], folder / "hub")
        for title in ("one", "two"):  # the upload of the first is held
            push.start(pipeline, commit_message=title)
        (folder / "go").touch()
        push.wait()
        push.start(pipeline, commit_message="three", card=CardDetails(step=3))
        push.wait()
        """,
        HERE,
        repo_id,
        tmp_path,
    )
    assert "Left out the push 'two'" in result.output
    assert [commit.title for commit in hub_server.repo(repo_id).commits] == ["initial commit", "one", "three"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub"], 'Expected --hub_model_id "organisation/name" with --push_to_hub, got None'),
        (["--push_to_hub", "--hub_model_id", "digits"], "got 'digits'"),
        (["--hub_push_steps", "5"], "Expected --push_to_hub with --hub_push_steps"),
        (["--push_to_hub", "--hub_model_id", "ant/digits", "--hub_push_steps", "0"], "Expected --hub_push_steps > 0"),
    ],
)
def test_flags_that_cannot_work_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train_config(flags)
