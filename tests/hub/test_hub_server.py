# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The server of these tests answers the Hub's own clients as they expect: huggingface_hub, datasets, diffusers."""

import hashlib


def test_revisions_listings_and_ranges(hub_server, hub_client, repo_id):
    hub_server.page_size = 3
    hub_client.run(
        """
        import sys
        from pathlib import Path
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

        api, repo_id = hub.HfApi(), sys.argv[1]
        assert api.whoami()["name"] == "ant"
        api.create_repo(repo_id)
        commits = []
        for content in (b"one", b"second"):
            names = ("a/b/c.bin", "a/b.json", "c.bin", "d.txt")
            operations = [hub.CommitOperationAdd(name, content) for name in names]
            commits.append(api.create_commit(repo_id, operations, commit_message=content.decode()).oid)

        # What is there, in pages.
        files = [".gitattributes", "a/b.json", "a/b/c.bin", "c.bin", "d.txt"]
        assert sorted(api.list_repo_files(repo_id)) == files
        tree = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True)}
        assert sorted(tree) == sorted([*files, "a", "a/b"]), sorted(tree)
        assert {entry.path for entry in api.list_repo_tree(repo_id, "a")} == {"a/b", "a/b.json"}
        assert tree["c.bin"].size == 6 and tree["c.bin"].lfs.sha256 == sys.argv[2] and tree["d.txt"].lfs is None
        assert [entry.path for entry in api.get_paths_info(repo_id, ["d.txt", "nothing"])] == ["d.txt"]
        info = api.model_info(repo_id, revision=commits[0], files_metadata=True)
        assert info.sha == commits[0] and {file.rfilename: file.size for file in info.siblings}["c.bin"] == 3
        assert [commit.title for commit in api.list_repo_commits(repo_id)] == ["second", "one", "initial commit"]
        assert {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).branches} == {"main": commits[1]}

        # Any revision can be had, and what is not there is named.
        for commit, content in zip(commits, (b"one", b"second")):
            for name in ("c.bin", "d.txt"):
                assert Path(hub.hf_hub_download(repo_id, name, revision=commit)).read_bytes() == content
        assert Path(hub.snapshot_download(repo_id), "a/b/c.bin").read_bytes() == b"second"
        for error, arguments in ((EntryNotFoundError, {"filename": "e"}), (RevisionNotFoundError, {"revision": "no"})):
            try:
                hub.hf_hub_download(repo_id, **{"filename": "c.bin", **arguments})
            except error:
                continue
            raise AssertionError(f"expected {error}")

        # Part of a file, and what was deleted is gone.
        with hub.HfFileSystem().open(f"{repo_id}/c.bin", block_size=2) as file:
            file.seek(3)
            assert file.read() == b"ond"
        api.delete_file("a/b/c.bin", repo_id)
        assert "a/b/c.bin" not in api.list_repo_files(repo_id)
        """,
        repo_id,
        hashlib.sha256(b"second").hexdigest(),
    )


def test_access(hub_server, hub_client, repo_id):
    code = """
    import sys
    import huggingface_hub as hub
    print(hub.HfApi().list_repo_files(sys.argv[1]))
    print(open(hub.hf_hub_download(sys.argv[1], "a.txt", cache_dir=sys.argv[2])).read())
    """
    repo = hub_server.add_repo(repo_id)
    file = hub_server.store("a.txt", b"hello")
    repo.commit("main", "One", {"a.txt": file})

    def read(token):
        return hub_client.run(code, repo_id, hub_client.folder / f"cache-{token}", token=token, check=False).output

    assert "hello" in read(None)
    assert "Invalid credentials in Authorization header" in read("hf_of_nobody")
    repo.gated = True
    gated = read("hf_bee")
    assert "['a.txt']" in gated and "GatedRepoError" in gated and "hello" not in gated
    repo.readers.add("bee")
    assert "hello" in read("hf_bee")
    repo.private = True
    assert "RepositoryNotFoundError" in read("hf_bee") and "hello" in read("hf_ant_read")


def test_a_download_cut_off_in_the_middle_is_resumed(hub_server, hub_client, repo_id):
    content = bytes(range(256)) * 1000
    file = hub_server.store("a.bin", content, is_lfs=True)
    hub_server.add_repo(repo_id).commit("main", "One", {"a.bin": file})
    hub_server.fail("GET /objects", status=None)
    hub_client.run(
        """
        import sys
        import huggingface_hub as hub
        try:
            path = hub.hf_hub_download(sys.argv[1], "a.bin")
        except OSError:  # older clients resume when asked again
            path = hub.hf_hub_download(sys.argv[1], "a.bin")
        assert open(path, "rb").read() == bytes(range(256)) * 1000
        """,
        repo_id,
    )
    assert len(hub_server.sent("GET /objects")) == 2


def test_datasets_are_pushed_loaded_and_streamed(hub_server, hub_client, repo_id):
    hub_client.run(
        """
        import sys
        import datasets
        import numpy as np
        import PIL.Image

        def records():
            for index in range(20):
                image = PIL.Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8))
                yield {"image": image, "label": index % 2}

        names = datasets.ClassLabel(names=["ant", "bee"])
        features = datasets.Features({"image": datasets.Image(), "label": names})
        datasets.Dataset.from_generator(records, features=features).push_to_hub(sys.argv[1], num_shards=2)
        whole = datasets.load_dataset(sys.argv[1], split="train")
        stream = datasets.load_dataset(sys.argv[1], split="train", streaming=True)
        assert whole.features == features and len(whole) == 20
        for source in (whole, stream):
            assert [np.asarray(record["image"]).max() for record in source] == [10 * index for index in range(20)]
            assert [record["label"] for record in source] == [0, 1] * 10
        """,
        repo_id,
    )
    assert len([path for path in hub_server.files(repo_id, "dataset") if path.endswith(".parquet")]) == 2


def test_models_are_pushed_and_loaded(hub_server, hub_client, repo_id):
    hub_client.run(
        """
        import sys
        import torch
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        unet = UNet2DModel(
            sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        )
        DDPMPipeline(unet, DDPMScheduler()).push_to_hub(sys.argv[1])
        loaded = DDPMPipeline.from_pretrained(sys.argv[1])
        alone = UNet2DModel.from_pretrained(sys.argv[1], subfolder="unet")
        for model in (loaded.unet, alone):
            for name, weight in unet.state_dict().items():
                assert torch.equal(weight, model.state_dict()[name])
        """,
        repo_id,
    )
    assert "unet/diffusion_pytorch_model.safetensors" in hub_server.files(repo_id)
