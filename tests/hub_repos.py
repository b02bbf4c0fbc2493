# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The repositories of the Hub's server: files, commits, branches, who may see what."""

import hashlib
import json
from dataclasses import dataclass, field


class HubError(Exception):
    """An answer with an error's status, and the code by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "", **body: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


@dataclass
class File:
    """`oid` is git's for the content, `sha256` that of a large file."""

    path: str
    size: int
    oid: str
    sha256: str
    is_lfs: bool

    def as_json(self) -> dict:
        entry = {"type": "file", "path": self.path, "size": self.size, "oid": self.oid}
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134}
        return entry | ({"lfs": lfs} if self.is_lfs else {})


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    kind: str
    repo_id: str
    private: bool = False
    gated: bool = False
    """Whether files are for the owner and `readers` only."""
    readers: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([parent, title, len(self.commits), {path: file.sha256 for path, file in files.items()}])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str | None) -> Commit:
        sha = self.branches.get(revision or "main", revision)
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
