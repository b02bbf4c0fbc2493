# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Xet storage for the Hub's server: the folder in which hf_xet itself keeps files where the storage is "local://...".

Clients talk to it through hf_xet, as to the real storage. Which file has which hash stands in the shards that they
leave there; their layout follows xet-core's documentation of the format.
"""

import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


# In a process of its own: hf_xet starts threads, which do not go with forks.
_DOWNLOAD = """
import sys, hf_xet
with hf_xet.XetSession().new_file_download_group(
    endpoint=f"local://{sys.argv[1]}", token="-", token_expiry_unix_secs=1 << 40
) as group:
    for name, size in zip(sys.argv[2::2], sys.argv[3::2]):
        group.start_download_file(hf_xet.XetFileInfo(name, int(size)), f"{sys.argv[1]}/{name}")
"""


class XetStore:
    def __init__(self, folder: Path):
        self.folder, self.url = folder, f"local://{folder}"
        self.hashes: dict[str, str] = {}

    def fetch(self) -> dict[str, bytes]:
        """The files that are new since the last time, by their SHA-256."""
        shards = self.folder.glob("xet/xorbs/shards/*.mdb")
        found = {sha256: (name, size) for shard in shards for name, size, sha256 in read_shard(shard.read_bytes())}
        new = {sha256: file for sha256, file in found.items() if sha256 not in self.hashes}
        words = [str(word) for file in new.values() for word in file]
        # From a copy: the client that waits for its commit holds a lock on the folder.
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(self.folder, copy, dirs_exist_ok=True)
            subprocess.run([sys.executable, "-c", _DOWNLOAD, copy, *words], check=True)
            contents = [Path(copy, name).read_bytes() for name, _ in new.values()]
        self.hashes |= {sha256: name for sha256, (name, _) in new.items()}
        return {hashlib.sha256(content).hexdigest(): content for content in contents}


def read_shard(shard: bytes) -> Iterator[tuple[str, int, str]]:
    """Xet's hash, size in bytes and SHA-256 of each file in a shard, which consists of records of 48 bytes."""
    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        flags, num_segments = struct.unpack_from("<II", shard, at + 32)
        size = sum(struct.unpack_from("<I", shard, at + 48 * (1 + segment) + 36)[0] for segment in range(num_segments))
        name = shard[at : at + 32]
        # Behind the segments lie as many checks, where bit 31 is set, and then the SHA-256.
        at += 48 * (1 + num_segments * (1 + (flags >> 31)))
        yield _hex(name), size, _hex(shard[at : at + 32])
        at += 48


def _hex(digest: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
