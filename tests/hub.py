"""A Hugging Face hub on loopback: as much of its protocol as fetching a model or a dataset needs, and its
bad days.

Two servers: the hub itself, and the store of large files that it redirects to (another origin, so that a
token which is sent on is seen). Metadata, tree with pages, `resolve` with HEAD, ETag, X-Repo-Commit,
X-Linked-Etag and X-Linked-Size, ranges, and the hub's answers for gated, private and missing things. Xet is
not advertised.

    with Hub() as hub:
        commit = hub.publish("maker/tiny", folder)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

Datasets are published as `datasets/maker/talk`. There is no datasets-server, as behind no mirror is.

By hand, with a folder in Hugging Face layout and 2 MB a second:

    python -m tests.hub maker/tiny FOLDER --rate 2000000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".onnx", ".parquet")
"""Kept in the store of large files, known by their sha256."""


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str
    is_private: bool = False
    is_gated: bool = False
    readers: set[str] = field(default_factory=set)
    """Tokens that may read a private or gated one."""
    branches: tuple[str, ...] = ("main",)


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    range: str | None
    is_store: bool
    user_agent: str = ""


class Hub:
    """`requests` is what was asked, in order. Faults hold for the file of that name in any repository."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.page_size = 1000
        self.rate: float | None = None
        """Bytes a second of each body; None: as fast as it goes."""
        self.cut: dict[str, list[int]] = {}
        """Bytes after which the connection breaks, once for each number."""
        self.changed: dict[str, int] = {}
        """How many times a body comes with one byte changed."""
        self.status: dict[str, list[int]] = {}
        """Statuses to answer with instead, once for each; the key is a part of the path."""
        self.ignores_ranges = False
        self._hub = _Server(self, "127.0.0.1", is_store=False)
        # localhost is another origin than 127.0.0.1, as the real store is another than the real hub.
        self._store = _Server(self, "localhost", is_store=True)

    def __enter__(self) -> Hub:
        for server in (self._hub, self._store):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return self._hub.url

    @property
    def store_url(self) -> str:
        return self._store.url

    def publish(self, name: str, folder: Path, **about: Any) -> str:
        """A commit with every file of `folder`, subfolders included; the commit is the digest of them all."""
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in files.items():
            digest.update(path.encode() + content)
        self.repositories[name] = Repository(files, digest.hexdigest(), **about)
        return digest.hexdigest()

    def fetched(self, suffix: str = "") -> list[str]:
        """Names of the files whose bodies were asked for, in order."""
        names = [
            request.path.rsplit("/", 1)[1]
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path
        ]
        return [name for name in names if name.endswith(suffix)]

    def by_digest(self, digest: str) -> tuple[str, bytes] | None:
        for repository in self.repositories.values():
            for name, content in repository.files.items():
                if hashlib.sha256(content).hexdigest() == digest:
                    return name, content
        return None


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def etag_of(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_digest(content)


_KIND = "(models|datasets)"
_NAME = "([^/]+(?:/[^/]+)?)"


def _key(kind: str, name: str) -> str:
    """Under which name a repository was published."""
    return name if kind == "models" else f"{kind}/{name}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, host: str, *, is_store: bool) -> None:
        self.hub = hub
        self.is_store = is_store
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://{host}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Silent: `Hub.requests` is the log."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._serve()

    # ------------------------------------------------------------ what is asked

    @property
    def hub(self) -> Hub:
        return self.server.hub

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(
            Request(
                self.command,
                path,
                self._token,
                self.headers.get("Range"),
                self.server.is_store,
                self.headers.get("User-Agent", ""),
            )
        )
        for part, statuses in self.hub.status.items():
            if part in path and statuses:
                return self._answer(statuses.pop(0), b"a bad day", {"Content-Type": "text/plain"})
        if self.server.is_store:
            return self._serve_large(path)
        if found := re.fullmatch(rf"/api/{_KIND}/{_NAME}/revision/(.+)", path):
            return self._serve_info(_key(found[1], found[2]), unquote(found[3]))
        if found := re.fullmatch(rf"/api/{_KIND}/{_NAME}/tree/([^/]+)(?:/(.+))?", path):
            return self._serve_tree(_key(found[1], found[2]), unquote(found[3]), unquote(found[4] or ""))
        if found := re.fullmatch(rf"/api/{_KIND}/{_NAME}/paths-info/([^/]+)", path):
            return self._serve_paths(_key(found[1], found[2]), unquote(found[3]))
        if found := re.fullmatch(rf"/api/{_KIND}/{_NAME}", path):
            return self._serve_info(_key(found[1], found[2]), "main")
        if found := re.fullmatch(rf"/(datasets/)?{_NAME}/resolve/([^/]+)/(.+)", path):
            name = _key((found[1] or "models/")[:-1], found[2])
            return self._serve_file(name, unquote(found[3]), unquote(found[4]))
        return self._refuse(404, "", "Not Found")

    def _find(self, name: str, revision: str) -> Repository | None:
        """None when it was answered: missing, private, or without such a revision."""
        repository = self.hub.repositories.get(name)
        if self._token == "invalid":
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        if repository is None or (repository.is_private and self._token not in repository.readers):
            # The hub does not tell a stranger whether a private repository exists.
            self._refuse(404 if self._token else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in (repository.commit, *repository.branches):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository

    def _serve_info(self, name: str, revision: str) -> None:
        if repository := self._find(name, revision):
            about = {
                "id": name.removeprefix("datasets/"),
                "modelId": name,
                "sha": repository.commit,
                "private": repository.is_private,
                "gated": "manual" if repository.is_gated else False,
                "siblings": [{"rfilename": path} for path in repository.files],
            }
            self._answer_json(about)

    def _serve_tree(self, name: str, revision: str, folder: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return None
        asked = parse_qs(urlsplit(self.path).query)
        is_recursive = asked.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = list(_entries(repository.files, folder, is_recursive))
        if folder and not entries:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist", commit=repository.commit)
        start = int(asked.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        more = {}
        if end < len(entries):
            again = f"cursor={end}&recursive={is_recursive}"
            more["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{again}>; rel="next"'
        return self._answer_json(entries[start:end], more)

    def _serve_paths(self, name: str, revision: str) -> None:
        if repository := self._find(name, revision):
            body = self._body.decode()
            asked = json.loads(body) if body.startswith("{") else parse_qs(body)
            entries = _entries(repository.files, "", True)
            self._answer_json([entry for entry in entries if entry["path"] in asked["paths"]])

    def _serve_file(self, name: str, revision: str, path: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return None
        if repository.is_gated and self._token not in repository.readers:
            return self._refuse(403 if self._token else 401, "GatedRepo", f"Access to {name} is restricted.")
        content = repository.files.get(path)
        if content is None:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist", commit=repository.commit)
        etag = etag_of(path, content)
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            headers["Location"] = f"{self.hub.store_url}/{etag}"
            return self._answer(302, b"", headers)
        return self._answer_body(path, content, headers)

    def _serve_large(self, path: str) -> None:
        found = self.hub.by_digest(path.removeprefix("/"))
        if found is None:
            return self._refuse(403, "", "Expired")
        name, content = found
        return self._answer_body(name, content, {"ETag": f'"{path[1:]}"', "Accept-Ranges": "bytes"})

    # ------------------------------------------------------------ what is answered

    def _refuse(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        if commit:
            headers["X-Repo-Commit"] = commit
        self._answer_json({"error": message}, headers, status)

    def _answer_json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._answer(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _answer_body(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start, stop = 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        is_part = wanted is not None and not self.hub.ignores_ranges
        if wanted and is_part:
            start = int(wanted[1])
            if start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if self.hub.changed.get(name, 0) > 0 and self.command == "GET":
            self.hub.changed[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        body = content[start:stop]
        self._head(206 if is_part else 200, len(body), headers)
        if self.command == "GET":
            self._send(name, body)

    def _send(self, name: str, body: bytes) -> None:
        cuts = self.hub.cut.get(name)
        allowed = cuts.pop(0) if cuts else len(body)
        for chunk in _chunks(body[:allowed]):
            self.wfile.write(chunk)
            self.wfile.flush()
            if self.hub.rate:
                time.sleep(len(chunk) / self.hub.rate)
        if allowed < len(body):
            self.close_connection = True
            self.connection.close()


def _chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]


def _entries(
    files: dict[str, bytes], under: str = "", is_recursive: bool = False
) -> Iterator[dict[str, Any]]:
    """What lies in a folder of a tree: without `is_recursive` a folder in it is one entry."""
    prefix = f"{under}/" if under else ""
    inside = {path: content for path, content in files.items() if path.startswith(prefix)}
    folders = {
        str(parent)
        for path in inside
        for parent in PurePosixPath(path.removeprefix(prefix)).parents
        if str(parent) != "."
    }
    for folder in sorted(folders):
        if is_recursive or "/" not in folder:
            yield {"type": "directory", "path": prefix + folder, "oid": "0" * 40, "size": 0}
    for path, content in inside.items():
        if is_recursive or "/" not in path.removeprefix(prefix):
            yield _entry(path, content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
        entry["oid"] = git_digest(pointer.encode())
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, help="bytes a second")
    parser.add_argument("--gated", action="store_true", help="the token 'reader' may read it")
    options = parser.parse_args()
    with Hub() as hub:
        hub.rate = options.rate
        commit = hub.publish(options.name, options.folder, is_gated=options.gated, readers={"reader"})
        print(f"HF_ENDPOINT={hub.url}\n{options.name} at {commit}", flush=True)
        told = 0
        while True:
            time.sleep(0.5)
            for request in hub.requests[told:]:
                print(f"{request.method} {request.path} {request.range or ''}", flush=True)
            told = len(hub.requests)


if __name__ == "__main__":
    main()
