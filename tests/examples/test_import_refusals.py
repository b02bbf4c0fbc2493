# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Webdataset shards that would lose records or mean something else than the flags say."""

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_tread.data import LatentCodec, latent_codec, latents_from_moments, open_latents
from diffusers_tread.data.latents import importing
from diffusers_tread.data.latents.codec import pack_latents
from diffusers_tread.data.latents.importing import read_webdataset


pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import import_latents  # noqa: E402
from tiny_vaes import make_vae  # noqa: E402


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


LATENTS = np.random.RandomState(0).randn(4, 8, 8).astype(np.float32)
ARRAY = npy(LATENTS)


def members(*keys, array=ARRAY, label=b"1"):
    return [(f"{key}.{part}", content) for key in keys for part, content in (("latent.npy", array), ("cls", label))]


def write_tar(path, files, mode="w", links=()):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        for name in links:
            header = tarfile.TarInfo(name)
            header.type, header.linkname = tarfile.LNKTYPE, files[0][0]
            tar.addfile(header)
    return path


def offsets(path):
    """Where the files of a tar begin, and its end."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()] + [tar.offset]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (members("a") + members("a"), "Expected each record once, got two files 'latent.npy' for a of"),
        (members("a", "b") + members("a"), "files of a record one after the other, got a of .* twice"),
        (members("a", "b", "a/b", "b"), "files of a record one after the other, got b of .* twice"),
        (members("a") + members("b")[:1] + members("c") + members("b")[1:], "'cls'.*without.*for b of"),
        (members("a") + [("a.cls", b"2")], "two files 'cls' for a of"),
        (members("a") + [("a.jpg", b"1"), ("a.jpg", b"2")], "two files 'jpg' for a of"),
    ],
)
def test_names_that_stand_twice_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        list(read_webdataset(write_tar(tmp_path / "0.tar", files)))


def test_the_same_key_in_folders_and_shards_is_another_record(tmp_path):
    tar = write_tar(tmp_path / "0.tar", members("a/0", "b/0"))
    assert [record.name for record in read_webdataset(tar)] == [f"a/0 of {tar}", f"b/0 of {tar}"]


@pytest.mark.parametrize(
    ("place", "more"),
    [(place, more) for place in (2, 4, 5) for more in (0, 100, 511, 512, 600)] + [(6, 0), (6, 1), (6, 511)],
)
def test_a_tar_cut_anywhere_is_refused(tmp_path, place, more):
    """Between two records, in a header, in an array; and after all records, in the block that ends an archive."""
    path = write_tar(tmp_path / "0.tar", members("a", "b", "c"))
    path.write_bytes(path.read_bytes()[: offsets(path)[place] + more])
    with pytest.raises(ValueError, match="Expected a whole tar file, got .*0.tar"):
        list(read_webdataset(path))


def test_a_tar_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected records in .*0.tar, got none"):
        list(read_webdataset(write_tar(tmp_path / "0.tar", [])))


@pytest.mark.parametrize("place", [1, 2, 4])
def test_a_damaged_header_is_not_the_end(tmp_path, place):
    path = write_tar(tmp_path / "0.tar", members("a", "b", "c"))
    content = bytearray(path.read_bytes())
    content[offsets(path)[place] + 150] ^= 0x55  # of its checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Expected a whole tar file, got .*0.tar"):
        list(read_webdataset(path))


def test_tars_joined_by_cat_are_refused(tmp_path):
    first, second = (write_tar(tmp_path / f"{key}.tar", members(key)) for key in "ab")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ValueError, match="it goes on after its end"):
        list(read_webdataset(first))


def test_compressed_shards_are_read_and_cut_ones_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar.gz", members("a", "b"), mode="w:gz")
    assert len(list(read_webdataset(path))) == 2
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="Expected a whole tar file"):
        list(read_webdataset(path))
    plain = gzip.decompress(write_tar(path, members("a", "b"), mode="w:gz").read_bytes())
    path.write_bytes(gzip.compress(plain[: len(plain) // 20480 * 10240]))
    with pytest.raises(ValueError, match="Expected a whole tar file"):
        list(read_webdataset(path))


def test_links_are_refused(tmp_path):
    """A tar of files with the same content may hold them once."""
    path = write_tar(tmp_path / "0.tar", members("a"), links=["b.latent.npy", "b.cls"])
    with pytest.raises(ValueError, match="Expected plain files, got b.latent.npy of .*0.tar, which is a link"):
        list(read_webdataset(path))


@pytest.mark.parametrize(
    ("array", "label", "message"),
    [
        (ARRAY[:-4], b"1", "Expected a NumPy array.*for a of"),
        (ARRAY[:60], b"1", "Expected a NumPy array.*for a of"),
        (ARRAY.replace(b"(4, 8, 8)", b"(4, 8, 9" + b")"), b"1", "Expected a NumPy array.*for a of"),
        (ARRAY.replace(b"4, 8, 8), }       ", b"9999999, 99999), }"), b"1", "Expected a NumPy array.*for a of"),
        (b"PK\x03\x04" + ARRAY, b"1", "Expected a NumPy array.*for a of"),
        (b"", b"1", "Expected a NumPy array.*for a of"),
        (npy(LATENTS.astype(np.complex64)), b"1", r"Expected latents \[M, S, S\], got complex64"),
        (npy(LATENTS[0]), b"1", r"Expected latents \[M, S, S\], got float32 \[8, 8\]"),
        (ARRAY, b"", "Expected an integer label"),
        (ARRAY, b"1.0", "Expected an integer label"),
        (ARRAY, b"1_0", "Expected an integer label"),
        (ARRAY, b"9" * 5000, "Expected at most 1024 bytes in 'cls'"),
    ],
)
def test_members_that_are_something_else_are_refused_by_name(tmp_path, array, label, message):
    tar = write_tar(tmp_path / "0.tar", members("a", array=array, label=label))
    with pytest.raises(ValueError, match=message):
        list(read_webdataset(tar))


def test_only_what_is_needed_is_read_one_record_at_a_time(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "0.tar", [("a.jpg", b"0" * 5000), *members("a", "b")])
    read, extract = [], tarfile.TarFile.extractfile

    def recorded(self, member):
        read.append(member.name)
        assert len(self.members) <= 1
        return extract(self, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", recorded)
    monkeypatch.setattr(importing, "_MAX_ARRAY", len(ARRAY))
    records = read_webdataset(tar)
    next(records)
    assert read == ["a.latent.npy", "a.cls"]
    next(records)
    assert read == ["a.latent.npy", "a.cls", "b.latent.npy", "b.cls"]
    with pytest.raises(ValueError, match="at most .* bytes in 'latent.npy'"):
        list(read_webdataset(write_tar(tmp_path / "1.tar", members("a", array=ARRAY + b"0"))))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tmp_path_factory.mktemp("vae")


def run(tars, output, vae, *flags, values="latents"):
    argv = ["--tars", tars, "--values", values, "--resolution", 16, "--num_classes", 3, "--output_dir", output]
    import_latents.main([str(word) for word in [*argv, "--pretrained_vae_name_or_path", vae, *flags]])
    dataset = open_latents(output)
    return dataset, dataset.__getitems__([(0, index) for index in range(len(dataset))])["moments"]


MEAN_STD = np.concatenate([LATENTS, np.abs(LATENTS) + 0.1])
MEAN_LOGVAR = np.concatenate([LATENTS, 2 * np.log(np.abs(LATENTS) + 0.1)])
ONE_NEGATIVE = MEAN_STD.copy()
ONE_NEGATIVE[7, 3, 3] = -1e-3


@pytest.mark.parametrize(
    ("array", "values", "message"),
    [
        (MEAN_LOGVAR, "moments", "which are never negative, got -.* for a of .*1.tar"),
        (MEAN_LOGVAR - 8, "moments", "say --values mean_logvar"),
        (ONE_NEGATIVE, "moments", "which are never negative, got -0.001 for a of"),
        (MEAN_STD, "mean_logvar", "say --values moments"),
    ],
)
def test_moments_that_are_something_else_are_refused(tmp_path, vae, array, values, message):
    make_vae("sd").save_pretrained(vae)
    good = {"moments": MEAN_STD, "mean_logvar": MEAN_LOGVAR}[values]
    write_tar(tmp_path / "0.tar", members("a", array=npy(good)))
    write_tar(tmp_path / "1.tar", members("a", array=npy(array)))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "*.tar", tmp_path / "latents", vae, values=values)
    assert not (tmp_path / "latents" / "latents.json").exists()


def test_shards_that_changed_since_are_refused_and_links_to_one_shard_too(tmp_path, vae):
    make_vae("sd").save_pretrained(vae)
    tar = write_tar(tmp_path / "0.tar", members("a"))
    run(tmp_path / "*.tar", tmp_path / "latents", vae)
    run(tmp_path / "*.tar", tmp_path / "latents", vae)
    os.utime(write_tar(tar, members("a", array=npy(LATENTS + 1))), ns=(0, 1))
    with pytest.raises(ValueError, match="got others under the same names.*train-00000-of-00001.arrow"):
        run(tmp_path / "*.tar", tmp_path / "latents", vae)
    (tmp_path / "1.tar").symlink_to(tar)
    with pytest.raises(ValueError, match="Expected each shard once"):
        run(tmp_path / "*.tar", tmp_path / "other", vae)


@pytest.mark.parametrize(("kind", "scaled"), [("sdxl", False), ("sdxl", True), ("flux2", False), ("flux2", True)])
def test_imported_latents_have_the_statistics_of_the_vae_unless_they_are_scaled(tmp_path, vae, kind, scaled):
    model = make_vae(kind)
    model.save_pretrained(vae)
    values = LATENTS if kind == "sdxl" else np.random.RandomState(1).randn(16, 4, 4).astype(np.float32)
    write_tar(tmp_path / "0.tar", members("a", array=npy(values)))
    flags = ["--dtype", "float32", *(["--scaled"] if scaled else [])]
    dataset, moments = run(tmp_path / "0.tar", tmp_path / "latents", vae, *flags)
    assert dataset.info.codec == (LatentCodec() if scaled else latent_codec(model))
    expected = torch.from_numpy(values)[None]
    expected = expected if scaled else latent_codec(model).normalize(expected)
    torch.testing.assert_close(latents_from_moments(moments, dataset.info), expected)


def test_unpacked_latents_of_flux2_are_packed(tmp_path, vae):
    """As its `encode` gives them; the batch norm's statistics are of 2x2 pixels."""
    make_vae("flux2").save_pretrained(vae)
    for values, array in (("latents", LATENTS), ("moments", MEAN_STD)):
        folder = tmp_path / values
        folder.mkdir()
        write_tar(folder / "0.tar", members("a", array=npy(array)))
        _, moments = run(folder / "0.tar", folder / "latents", vae, "--dtype", "float32", values=values)
        parts = torch.from_numpy(array).split(4)
        assert torch.equal(moments[0], torch.cat([pack_latents(part[None], 2) for part in parts], dim=1)[0])
