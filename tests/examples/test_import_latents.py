# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Webdataset shards as others write them, imported and read back."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusers_tread.data import LatentsDataset, latents_from_moments
from diffusers_tread.fingerprint import weights_fingerprint


pytest.importorskip("datasets")
import import_latents  # noqa: E402


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.2, shift_factor=0.3)
    vae.save_pretrained(folder)
    return folder


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_tars(folder, records, *, latent="latent.npy", label="cls", encode=npy):
    """Records (values, label) in tars of five, with other members and folders around them."""
    folder.mkdir()
    for first in range(0, len(records), 5):
        with tarfile.open(folder / f"{first:04d}.tar", "w") as tar:
            for index in range(first, min(first + 5, len(records))):
                values, number = records[index]
                members = {latent: encode(values), label: str(number).encode(), "json": b"{}"}
                for member, content in members.items():
                    header = tarfile.TarInfo(f"./part.a/{index:07d}.{member}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    return f"{folder}/*.tar"


def make_records(channels, count=12, dtype=np.float32):
    rng = np.random.RandomState(0)
    return [(rng.randn(channels, 8, 8).astype(dtype), int(rng.randint(3))) for _ in range(count)]


def run(tars, vae, folder, *flags, values="latents"):
    import_latents.main(
        ["--tars", tars, "--values", values, "--resolution", "8", "--output_dir", str(folder), *flags]
        + ["--pretrained_vae_name_or_path", str(vae)]
        + ([] if "--id2label" in flags else ["--num_classes", "3"])
    )
    dataset = LatentsDataset(folder, seed=0)
    return dataset, dataset.__getitems__([(0, index) for index in range(len(dataset))])


def test_latents_that_are_scaled_come_out_as_they_are(vae, tmp_path):
    records = make_records(4, dtype=np.float16)
    names = json.dumps({label: name for label, name in enumerate(("ant", "bee", "cat"))})
    tars = write_tars(tmp_path / "tars", records)
    dataset, batch = run(tars, vae, tmp_path / "latents", "--scaled", "--id2label", names)
    expected = torch.from_numpy(np.stack([values for values, _ in records]))
    assert torch.equal(batch["moments"], expected) and batch["moments"].dtype == torch.float16
    assert torch.equal(latents_from_moments(batch["moments"], dataset.info), expected.float())
    assert batch["class_labels"].tolist() == [label for _, label in records] and dataset.id2label[1] == "bee"
    assert dataset.info.vae["fingerprint"] == weights_fingerprint(AutoencoderKL.from_pretrained(vae))
    assert dataset.info.crop == "unknown" and "unknown crop" in (tmp_path / "latents" / "README.md").read_text()


def test_latents_that_are_not_scaled_get_the_scale_of_the_vae(vae, tmp_path):
    records = [(values[None], label) for values, label in make_records(4)]  # [1, C, S, S], as some write them
    flags = ["--dtype", "float32", "--latent_member", "npy", "--label_member", "label.txt"]
    tars = write_tars(tmp_path / "tars", records, latent="npy", label="label.txt")
    dataset, batch = run(tars, vae, tmp_path / "latents", *flags)
    expected = torch.from_numpy(np.concatenate([values for values, _ in records]))
    torch.testing.assert_close(latents_from_moments(batch["moments"], dataset.info), (expected - 0.3) * 0.2)


def test_log_variances_become_the_deviations_of_diffusers_posterior(vae, tmp_path):
    records = make_records(8)
    records[0][0][4:] *= 60  # beyond the range of the clamp
    tars = write_tars(tmp_path / "tars", records)
    dataset, batch = run(tars, vae, tmp_path / "latents", "--dtype", "float32", values="mean_logvar")
    posterior = DiagonalGaussianDistribution(torch.from_numpy(np.stack([values for values, _ in records])))
    torch.testing.assert_close(batch["moments"], torch.cat([posterior.mean, posterior.std], dim=1))
    latents = latents_from_moments(batch["moments"], dataset.info, generator=torch.Generator().manual_seed(3))
    expected = (posterior.sample(torch.Generator().manual_seed(3)) - 0.3) * 0.2
    torch.testing.assert_close(latents, expected)


def test_an_import_that_broke_off_goes_on(vae, tmp_path):
    tars = write_tars(tmp_path / "tars", make_records(4))
    last = sorted((tmp_path / "tars").iterdir())[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:1900])  # in the middle of the first array
    with pytest.raises(ValueError, match="whole tar file.*0010.tar"):
        run(tars, vae, tmp_path / "latents")
    first = next((tmp_path / "latents").rglob("train-00000*.arrow"))
    before = first.stat().st_mtime_ns
    last.write_bytes(whole)
    dataset, _ = run(tars, vae, tmp_path / "latents")
    assert len(dataset) == 12 and first.stat().st_mtime_ns == before
    other, _ = run(tars, vae, tmp_path / "unbroken")
    assert [shard["sha256"] for shard in dataset.info.shards] == [shard["sha256"] for shard in other.info.shards]


class Hostile:
    def __reduce__(self):
        return (Path.write_text, (Path("hostile.txt"), "ran"))


@pytest.mark.parametrize("encode", [pickle.dumps, lambda values: npy(np.array([Hostile()], dtype=object))])
def test_pickles_are_refused_and_nothing_of_them_runs(vae, tmp_path, encode, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tars = write_tars(tmp_path / "tars", [(Hostile(), 0)], encode=encode)
    with pytest.raises(ValueError, match="Pickles are not read"):
        run(tars, vae, tmp_path / "latents")
    assert not Path("hostile.txt").exists()


@pytest.mark.parametrize(
    ("records", "flags", "message"),
    [
        (make_records(8), [], r"latents \[4, 8, 8\].*got \[8, 8, 8\]"),
        (make_records(4), ["--values", "moments"], r"moments \[8, 8, 8\].*got \[4, 8, 8\]"),
        (make_records(4), ["--resolution", "16"], r"\[4, 16, 16\].*got \[4, 8, 8\]"),
        ([*make_records(4), (np.zeros((4, 8, 4), np.float32), 0)], [], r"got \[4, 8, 4\] for .*0000012"),
        ([*make_records(4), (np.zeros((4, 8, 8), np.float32), 3)], [], r"labels in \[0, 3\), got 3 for .*0000012"),
        ([*make_records(4), (np.zeros((4, 8, 8), np.int64), 0)], [], r"got int64 \[4, 8, 8\] for .*0000012"),
        ([*make_records(4), (np.full((4, 8, 8), 1e6, np.float32), 0)], [], r"finite values.*0000012"),
        (make_records(4), ["--latent_member", "moments.npy"], r"\['moments.npy'\] for .*0000000"),
        ([], [], "Expected shards with records"),
        (make_records(4), ["--id2label", "{}", "--num_classes", "3"], "either --num_classes or --id2label"),
        (make_records(4), ["--values", "mean_logvar", "--scaled"], "no scale fits"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(vae, tmp_path, records, flags, message):
    with pytest.raises(ValueError, match=message):
        run(write_tars(tmp_path / "tars", records), vae, tmp_path / "latents", *flags)
    assert not (tmp_path / "latents" / "latents.json").exists()
