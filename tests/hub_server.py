# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A server that speaks the Hub's HTTP protocol, as far as huggingface_hub 0.3x to 2.x, datasets and diffusers need it.

Repositories with history, branches and access rights live in memory; large files travel by Git LFS, basic or in parts,
or by Xet, to which clients turn themselves unless HF_HUB_DISABLE_XET=1. Requests can be made to fail. What the answers
look like follows huggingface_hub's client code and https://huggingface.co/docs/hub/api.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import Commit, File, HubError, Repo
from hub_xet import XetStore


DATE = "2026-01-01T00:00:00.000Z"
# Tokens of a user who may write to "ant/...", of the same who may only read, and of somebody else.
TOKENS = {"hf_ant": ("ant", "write"), "hf_ant_read": ("ant", "read"), "hf_bee": ("bee", "write")}
LFS_PATTERNS = "*.arrow *.bin *.gz *.jpg *.npy *.npz *.parquet *.png *.pt *.pth *.safetensors *.tar *.zip".split()
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches; None drops the connection half-way."""

    matching: str
    times: int
    status: int | None


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of this machine, in a thread, from its creation until `close`."""

    daemon_threads = True

    def __init__(self, xet_folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another host to the client, to which it must not send its token.
        self.storage_url = f"http://localhost:{self.server_port}"
        self.lock, self.xet = threading.Lock(), XetStore(xet_folder)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        """Forgets everything but repositories and objects."""
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        # Called before a request is answered.
        self.on_request: Callable[[], None] | None = None
        # Large files come in parts of this size.
        self.part_size = 1 << 30

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed is no error of the server's."""

    def fail(self, matching: str, *, times: int = 1, status: int | None = 503) -> None:
        """Makes the next requests fail whose "METHOD /path" matches the regular expression."""
        self.faults.append(Fault(matching, times, status))

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.matching, request):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, matching: str) -> list[str]:
        """The requests so far that match, failed ones included."""
        return [request for request in self.requests if re.search(matching, request)]

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def add_repo(self, repo_id: str, kind: str = "model", *, private: bool = False) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        attributes = self.store(".gitattributes", GIT_ATTRIBUTES)
        repo.commit("main", "initial commit", {attributes.path: attributes})
        return repo

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The content of a repository, by path."""
        commit = self.repo(repo_id, kind).at(revision)
        return {path: self.objects[file.sha256] for path, file in commit.files.items()}

    def store(self, path: str, content: bytes, *, is_lfs: bool = False) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.objects[sha256] = content
        return File(path, len(content), oid, sha256, is_lfs)


_REPO = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets(?=/))?/?(?P<repo_id>[^/]+/[^/]+?)"
_ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create_repo",
    r"POST /api/validate-yaml": "validate_yaml",
    rf"GET {_REPO}(?:/revision/(?P<revision>[^/]+))?": "repo_info",
    rf"GET {_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?": "list_tree",
    rf"POST {_REPO}/paths-info/(?P<revision>[^/]+)": "paths_info",
    rf"GET {_REPO}/xet-(?P<right>read|write)-token/(?P<revision>[^/]+)": "xet_token",
    rf"POST {_REPO}/branch/(?P<revision>[^/]+)": "create_branch",
    rf"POST {_REPO}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"POST {_REPO}/commit/(?P<revision>[^/]+)": "create_commit",
    rf"POST {_PAGE}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<sha256>\w{64})(?:/(?P<part>\d+))?": "lfs_upload",
    r"POST /lfs/(?P<sha256>\w{64})/(?P<step>complete|verify)": "lfs_finish",
    rf"(?:GET|HEAD) {_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
    r"(?:GET|HEAD) /objects/(?P<sha256>\w{64})": "send_object",
}


class Handler(BaseHTTPRequestHandler):
    """One method per route; it returns JSON, or sends its answer itself and returns None."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.extra_headers = {}
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = f"{self.command} {url.path}"
        self.server.requests.append(request)
        if self.server.on_request is not None:
            self.server.on_request()
        self.fault = self.server.take_fault(request)
        if self.fault and self.fault.status is None and self.command != "GET":
            # Dropped while the body is on its way.
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            if self.fault and self.fault.status is not None:
                raise HubError(self.fault.status, "A fault that the test asked for.")
            for route, name in _ROUTES.items():
                if match := re.fullmatch(route, request):
                    arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    answer = getattr(self, name)(**arguments)
                    break
            else:
                raise HubError(404, f"No such route: {request}")
            if answer is not None:
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"} | self.extra_headers)
        except HubError as error:
            self.send(error.status, json.dumps(error.body).encode(), error.headers)
        except ConnectionError:
            raise
        except Exception:
            # Our mistake, which clients must not take for one to try again after.
            self.send(400, traceback.format_exc().encode())

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    # Plumbing.

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            dropped = self.fault is not None and self.fault.status is None
            self.wfile.write(body[: len(body) // 2] if dropped else body)
            self.close_connection |= dropped

    def user(self) -> tuple[str | None, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, "read"))

    def repo(self, kind: str | None, repo_id: str, *, write: bool = False, files: bool = False) -> Repo:
        """The repository, if this user may do this with it."""
        (user, role), repo = self.user(), self.server.repos.get(((kind or "models").rstrip("s"), repo_id))
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and (user != repo.owner or role != "write"):
            raise HubError(403, "Forbidden: you don't have write access to this repository")
        if files and repo.gated and user not in {repo.owner, *repo.readers}:
            message = f"Access to {kind or 'model'} {repo_id} is restricted. You must have access to it."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return repo

    # Users and repositories.

    def whoami(self):
        user, role = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "token", "role": role}
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    def create_repo(self):
        values, (user, role) = json.loads(self.body), self.user()
        kind, owner = values.get("type") or "model", values.get("organization") or user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != owner or role != "write":
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{owner}/{values['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        with self.server.lock:
            if (kind, repo_id) in self.server.repos:
                raise HubError(409, f"You already created this {kind} repo", url=url)
            private = bool(values.get("private")) or values.get("visibility") == "private"
            self.server.add_repo(repo_id, kind, private=private)
        return {"url": url, "name": repo_id}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def repo_info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        commit, blobs = repo.at(revision), self.query.get("blobs")
        siblings = [
            {"rfilename": path} | ({**file.as_json(), "blobId": file.oid} if blobs else {})
            for path, file in commit.files.items()
        ]
        info = {"_id": "0", "id": repo_id, "author": repo.owner, "sha": commit.sha, "lastModified": DATE}
        info |= {"createdAt": DATE, "private": repo.private, "gated": "auto" if repo.gated else False, "tags": []}
        return info | {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings, "xetEnabled": True}

    def create_branch(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        if revision in repo.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        repo.branches[revision] = repo.at(json.loads(self.body or b"{}").get("startingPoint")).sha
        return {}

    # Listing files.

    def entries(self, commit: Commit) -> dict[str, dict]:
        """Files and folders by path."""
        entries = {path: file.as_json() for path, file in commit.files.items()}
        for path in list(entries):
            while "/" in path:
                path = path.rpartition("/")[0]
                oid = hashlib.sha1(path.encode()).hexdigest()
                entries[path] = {"type": "directory", "path": path, "size": 0, "oid": oid}
        if self.query.get("expand") in ("true", "True", "1"):
            last = {"id": commit.sha, "title": commit.title, "date": DATE}
            entries = {path: entry | {"lastCommit": last} for path, entry in entries.items()}
        return dict(sorted(entries.items()))

    def list_tree(self, kind, repo_id, revision, path):
        entries = self.entries(self.repo(kind, repo_id).at(revision))
        if path and path not in entries:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        prefix = f"{path}/" if path else ""
        found = [entry for name, entry in entries.items() if name.startswith(prefix)]
        if self.query.get("recursive") not in ("true", "True", "1"):
            found = [entry for entry in found if "/" not in entry["path"][len(prefix) :]]
        return found

    def paths_info(self, kind, repo_id, revision):
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
        entries = self.entries(self.repo(kind, repo_id).at(revision))
        return [entries[path.strip("/")] for path in paths if path.strip("/") in entries]

    # Downloads.

    def resolve(self, kind, repo_id, revision, path):
        commit = self.repo(kind, repo_id, files=True).at(revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha}
        if file is None:
            error = HubError(404, f"{path} does not exist", "EntryNotFound")
            error.headers |= headers
            raise error
        if not file.is_lfs:
            return self.send_object(file.sha256, headers | {"ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.sha256 in self.server.xet.hashes:
            token = f"{self.server.url}/api/{kind or 'models'}/{repo_id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": self.server.xet.hashes[file.sha256], "Link": f'<{token}>; rel="xet-auth"'}
        self.send(302, headers=headers | {"Location": f"{self.server.storage_url}/objects/{file.sha256}"})

    def send_object(self, sha256, headers=None):
        if headers is None and "Authorization" in self.headers:
            raise HubError(400, "A token was sent to the storage")
        content = self.server.objects[sha256]
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"} | (headers or {})
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if start > end:
                return self.send(416, headers={"Content-Range": f"bytes */{len(content)}"})
            part = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            return self.send(206, content[start : end + 1], headers | part)
        self.send(200, content, headers)

    # Uploads.

    def xet_token(self, kind, repo_id, right, revision):
        self.repo(kind, repo_id, write=right == "write", files=True)
        token = {"casUrl": self.server.xet.url, "accessToken": "-", "exp": 1 << 40}
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        self.extra_headers = {names[key]: str(value) for key, value in token.items()}
        return token

    def preupload(self, kind, repo_id, revision):
        known = self.repo(kind, repo_id, write=True).at(revision).files
        answer = []
        for file in json.loads(self.body)["files"]:
            path, before = file["path"], known.get(file["path"])
            is_lfs = file["size"] > 10 << 20 or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            oid = {} if before is None else {"oid": before.sha256 if before.is_lfs else before.oid}
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": answer}

    def create_commit(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with self.server.lock:
            parent = repo.at(revision)
            if header["value"].get("parentCommit") not in (None, parent.sha):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for operation in operations:
                self.apply(operation["key"], operation["value"], files)
            commit = repo.commit(revision, header["value"]["summary"], files)
        url = f"{self.server.url}/{repo_id}/commit/{commit.sha}"
        return {"success": True, "commitOid": commit.sha, "commitUrl": url}

    def apply(self, key: str, value: dict, files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.server.store(path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.server.objects:
                self.server.objects |= self.server.xet.fetch()
            if value["oid"] not in self.server.objects:
                raise HubError(400, f"LFS pointer of {path} refers to an object that was not uploaded")
            files[path] = self.server.store(path, self.server.objects[value["oid"]], is_lfs=True)
        else:
            raise HubError(400, f"Unknown operation {key}")

    def lfs_batch(self, kind, repo_id):
        self.repo(kind, repo_id, write=True)
        request, objects = json.loads(self.body), []
        if "xet" in request["transfers"]:
            return {"transfer": "xet", "objects": request["objects"]}
        for wanted in request["objects"]:
            sha256, size, part_size = wanted["oid"], wanted["size"], self.server.part_size
            here = f"{self.server.url}/lfs/{sha256}"
            upload: dict = {"href": here}
            if size > part_size:
                parts = {str(part + 1): f"{here}/{part + 1}" for part in range(-(-size // part_size))}
                upload = {"href": f"{here}/complete", "header": {"chunk_size": str(part_size), **parts}}
            actions = {"upload": upload, "verify": {"href": f"{here}/verify"}}
            is_new = sha256 not in self.server.objects
            objects.append({"oid": sha256, "size": size} | ({"actions": actions} if is_new else {}))
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, sha256, part):
        if part is None:
            self.keep(sha256, self.body)
        else:
            self.server.parts[sha256, int(part)] = self.body
        self.send(200, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_finish(self, sha256, step):
        if step == "complete":
            numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
            self.keep(sha256, b"".join(self.server.parts.pop((sha256, number)) for number in numbers))
        elif len(self.server.objects.get(sha256, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, "Object does not exist or has another size")
        return {}

    def keep(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, "The content does not have the announced SHA-256")
        self.server.objects[sha256] = content
