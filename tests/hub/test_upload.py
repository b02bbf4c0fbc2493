# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""`upload_folder` against a server that speaks the Hub's protocol, by huggingface_hub as it is."""

import json
import os
import signal

import pytest

from diffusers_tread.hub import upload_folder


UPLOAD = """
import json, sys
from diffusers_tread.hub import upload_folder
print("URL", upload_folder(sys.argv[1], repo_id=sys.argv[2], **json.loads(sys.argv[3])))
"""


@pytest.fixture
def folder(tmp_path):
    """A small file and six large ones, in Git LFS by their names."""
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "README.md").write_text("---\ntags: [tread]\n---\n# A card\n")
    for index in range(6):
        (tmp_path / "run" / "data" / f"{index}.bin").write_bytes(os.urandom(1000 + index))
    return tmp_path / "run"


@pytest.fixture
def upload(hub_client, repo_id, folder):
    """Uploads the folder in a process of its own; further arguments are for `upload_folder`."""

    def run(*, hub_token="hf_ant", xet=False, check=True, to=repo_id, **options):
        return hub_client.run(UPLOAD, folder, to, json.dumps(options), token=hub_token, xet=xet, check=check)

    return run


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploaded(hub_server, *repo, **revision):
    files = hub_server.files(*repo, **revision)
    del files[".gitattributes"]
    return files


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_folder_arrives_as_it_is(repo_type, hub_server, upload, repo_id, folder):
    result = upload(repo_type=repo_type, private=True, commit_message="Six files")
    assert uploaded(hub_server, repo_id, repo_type) == content(folder)
    repo = hub_server.repo(repo_id, repo_type)
    assert repo.private and [commit.title for commit in repo.commits] == ["initial commit", "Six files"]
    assert f"URL {hub_server.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}\n" in result.output


def test_only_what_is_new_is_sent_and_ignored_files_are_not(hub_server, upload, repo_id, folder):
    upload()
    (folder / "data" / "3.bin").write_bytes(b"other content")
    (folder / "data" / "6.bin.tmp").write_bytes(b"half")
    hub_server.requests.clear()
    upload(ignore_patterns=["*.tmp"])
    assert len(hub_server.sent("PUT /lfs")) == 1
    assert uploaded(hub_server, repo_id)["data/3.bin"] == b"other content"
    assert "data/6.bin.tmp" not in uploaded(hub_server, repo_id)
    upload(ignore_patterns=["*.tmp"])
    assert len(hub_server.repo(repo_id).commits) == 3  # none without a change


def test_a_branch_is_made_and_the_default_one_left(hub_server, upload, repo_id, folder):
    upload(revision="step-10")
    upload(revision="step-10")
    assert uploaded(hub_server, repo_id, revision="step-10") == content(folder)
    assert uploaded(hub_server, repo_id) == {}


def test_a_killed_upload_goes_on_where_it_was(hub_server, hub_client, upload, repo_id, folder):
    def kill_after_three():
        if len(hub_server.sent("POST /lfs/.*/verify")) >= 3:
            hub_server.on_request = None
            os.kill(hub_client.pid, signal.SIGKILL)

    hub_server.on_request = kill_after_three
    assert upload(check=False).returncode == -signal.SIGKILL
    assert uploaded(hub_server, repo_id) == {}  # nothing half-done is seen
    known = set(hub_server.objects)

    hub_server.reset()
    upload()
    assert uploaded(hub_server, repo_id) == content(folder)
    sent = {request.split("/")[2] for request in hub_server.sent("PUT /lfs")}
    assert len(sent) <= 3 and not sent & known


def test_xet_is_used_where_it_is_there(hub_server, hub_client, upload, repo_id, folder):
    pytest.importorskip("hf_xet")
    upload(xet=True)
    assert uploaded(hub_server, repo_id) == content(folder)
    assert hub_server.sent("xet-write-token") and not hub_server.sent("PUT /lfs")

    (folder / "data" / "6.bin").write_bytes(os.urandom(1000))
    hub_server.reset()
    hub_server.fail("commit", status=413)
    upload(xet=True, check=False)
    assert "data/6.bin" not in uploaded(hub_server, repo_id)
    upload(xet=True)
    assert uploaded(hub_server, repo_id) == content(folder)
    code = """
        import sys
        import huggingface_hub as hub
        assert open(hub.hf_hub_download(sys.argv[1], "data/6.bin"), "rb").read() == open(sys.argv[2], "rb").read()
    """
    hub_client.run(code, repo_id, folder / "data" / "6.bin", xet=True)
    assert hub_server.sent("xet-read-token") and not hub_server.sent("GET /objects")


def test_faults_are_ridden_out(hub_server, upload, repo_id, folder):
    hub_server.part_size = 400
    hub_server.fail("PUT /lfs/.*/2", status=None)
    hub_server.fail("POST /api/models/.*/commit", status=500)
    result = upload()
    assert uploaded(hub_server, repo_id) == content(folder)
    assert f"Failed to upload {folder} to {repo_id}" in result.output and "Trying again in 1 s." in result.output


def test_an_unreachable_hub_ends_with_how_to_go_on(hub_server, upload, repo_id, folder):
    hub_server.fail("POST /api/repos/create", times=2, status=None)
    result = upload(check=False, max_retries=1)
    assert result.returncode == 1 and len(hub_server.sent("create")) == 2
    assert f"ConnectionError: Expected to open {repo_id} on the Hub, got no connection" in result.output
    assert "Nothing local is lost: the same command later sends what is missing." in result.output
    upload(max_retries=0)
    assert uploaded(hub_server, repo_id) == content(folder)


@pytest.mark.parametrize(
    ("hub_token", "to"),
    [(None, "ant/mine"), ("hf_of_nobody", "ant/mine"), ("hf_ant_read", "ant/mine")]
    + [("hf_ant", "bee/theirs"), ("hf_ant", "bee/existing")],
)
def test_a_token_that_may_not_write_is_refused_before_anything_is_sent(hub_token, to, hub_server, upload):
    hub_server.add_repo("bee/existing")
    result = upload(hub_token=hub_token, to=to, check=False)
    got = "got none" if hub_token is None else "got one that may not"
    assert f"ValueError: Expected a token that may write to {to}, {got}" in result.output
    assert "Run `hf auth login` or set HF_TOKEN." in result.output
    assert not hub_server.sent("PUT|commit") and len(hub_server.sent("create")) == 1


def test_what_cannot_be_uploaded_is_refused(tmp_path, folder, upload, hub_server):
    with pytest.raises(ValueError, match="Expected a folder with files to upload to ant/new, got"):
        upload_folder(tmp_path / "missing", repo_id="ant/new")
    assert "Repo id must" in upload(to="not//a name", check=False).output
    hub_server.fail("preupload", status=413)
    result = upload(to="ant/too-large", check=False)
    assert f"Expected to upload {folder} to ant/too-large, got a refusal" in result.output
    assert len(hub_server.sent("preupload")) == 1


def test_offline_mode_is_named(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="got HF_HUB_OFFLINE=1. Unset it."):
        upload_folder(folder, repo_id="ant/new")
