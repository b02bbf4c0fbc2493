# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""An upload sends what was made, and not what else lies in the folder or where its links lead."""

import json
import logging
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub import HfApi, RepoUrl

from diffusers_tread.hub import upload, upload_folder


@pytest.fixture
def sent(monkeypatch):
    """Names of the files that huggingface_hub is told to send."""
    names = []

    def receive(self, *, folder_path, allow_patterns, **options):
        for path in sorted(Path(folder_path).rglob("*")):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                names.append(name)

    monkeypatch.setattr(HfApi, "upload_folder", receive)
    monkeypatch.setattr(upload, "open_repo", lambda repo_id, **options: RepoUrl(f"https://huggingface.co/{repo_id}"))
    return names


def write(folder, *names, index=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    for name, content in (index or {}).items():
        (folder / name).write_text(json.dumps(content))


PIPELINE = {"_class_name": ["pipeline", "TREADPipeline"], "transformer": ["x", "Y"], "vae": [None, None]}
MADE = {
    "pipeline": ({"model_index.json": PIPELINE}, ["transformer/config.json", "transformer/w [1].safetensors"]),
    "latents": ({"latents.json": {"shards": [{"file": "data/0.arrow"}]}}, ["data/0.arrow"]),
    "other": ({}, ["runs/a.txt", "b.txt"]),
}
HIDDEN = [".env", ".git/config", "transformer/.env", "data/.secret", ".hidden/deep/key.pem"]
STRANGERS = ["id_rsa", "notes.txt", "train.log", "secrets/key.json", "transformer.json"]


@pytest.mark.parametrize("kind", MADE)
def test_hidden_files_and_links_stay(tmp_path, sent, caplog, kind):
    index, files = MADE[kind]
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    write(elsewhere, "password", "inner/password")
    write(folder, "README.md", *files, *HIDDEN, index=index)
    first = Path(files[0]).parent
    os.symlink(elsewhere / "password", folder / first / "linked.json")
    os.symlink(elsewhere / "inner", folder / first / "linked")
    os.symlink(elsewhere / "nothing", folder / first / "dangling.json")

    with caplog.at_level(logging.WARNING):
        upload_folder(folder, repo_id="ant/bee")
    assert sent == sorted(["README.md", *files, *index])
    assert all(name in caplog.text for name in (".env", "linked.json", "dangling.json"))


@pytest.mark.parametrize("kind", ["pipeline", "latents"])
def test_so_do_files_that_nothing_names(tmp_path, sent, caplog, kind):
    index, files = MADE[kind]
    write(tmp_path, "README.md", *files, *STRANGERS, "data/1.arrow", "vae/old.safetensors", index=index)
    with caplog.at_level(logging.WARNING):
        upload_folder(tmp_path, repo_id="ant/bee")
    assert sent == sorted(["README.md", *files, *index])
    assert "id_rsa" in caplog.text


def test_a_folder_of_links_alone_is_refused(tmp_path, sent):
    write(tmp_path / "cache", "model_index.json")
    (tmp_path / "snapshot").mkdir()
    os.symlink(tmp_path / "cache" / "model_index.json", tmp_path / "snapshot" / "README.md")
    with pytest.raises(ValueError, match="Expected a folder with files to upload .*README.md"):
        upload_folder(tmp_path / "snapshot", repo_id="ant/bee")
    assert not sent
