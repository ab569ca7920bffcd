"""A Hub on the loopback address, which can refuse, cut, lie and be slow, and counts what it is asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


def commit_of(files: Files) -> str:
    content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
    return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class FakeHub:
    """repositories: by USER/NAME the files at each revision. asked: method and path of every request."""

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    token: str = "hf_right"
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    lies: set[str] = field(default_factory=set)  # names of files that come with one byte changed
    cuts: dict[str, int] = field(default_factory=dict)  # by name, how many answers end in the middle
    slow: set[str] = field(default_factory=set)  # a few bytes, then nothing for minutes
    page: bool = False  # every answer is a proxy's page
    status: int = 0  # every answer is this one
    size: int | None = None  # what every file is said to have
    uploads: Files = field(default_factory=dict)  # by SHA-256
    url: str = ""

    def add(self, repository: str, files: Files, revision: str = "main") -> str:
        """Returns the commit, which is a revision too."""
        revisions = self.repositories.setdefault(repository, {})
        revisions[revision] = revisions[commit_of(files)] = files
        return commit_of(files)

    def gets(self, name: str = "") -> list[str]:
        """The downloads of files whose path ends in `name`."""
        return [
            line
            for line in self.asked
            if line.startswith("GET") and "/resolve/" in line and line.endswith(name)
        ]

    @classmethod
    def started(cls) -> FakeHub:
        """One that answers until the process ends."""
        hub = cls()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return hub

    def reset(self) -> None:
        """Forgets what it has, what it was asked, and its faults."""
        self.__init__(url=self.url)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.page:
            self._send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        elif self.hub.status:
            self._send(self.hub.status, b"")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            self._file(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:tree|revision)/([^/?]+).*", self.path):
            self._listing(*match.groups())
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _repository(self, name: str, revision: str) -> Files | None:
        """The files; None after an answer that says why not."""
        hub = self.hub
        allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if name not in hub.repositories or (name in hub.private and not allowed):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif name in hub.gated and not allowed:
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        elif revision not in hub.repositories[name]:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return hub.repositories[name][revision]
        return None

    def _file(self, name: str, revision: str, path: str) -> None:
        files = self._repository(name, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": commit_of(files)}
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        content = files[path]
        etag = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **commit}
        if not path.endswith((".json", ".yaml", ".md")):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        if self.hub.size is not None:
            headers["X-Linked-Size"] = str(self.hub.size)
        if path in self.hub.lies:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, path)

    def _listing(self, name: str, revision: str) -> None:
        files = self._repository(name, revision)
        if files is not None:
            listed = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": commit_of(files), "siblings": siblings, "tags": [], "private": False}
            self._send(200, json.dumps(listed if "/tree/" in self.path else info).encode())

    def do_POST(self) -> None:
        """What an upload asks: a repository, which files go to LFS, where to, and a commit."""
        self.hub.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, b"")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            known = name in self.hub.repositories
            if not known:
                self.hub.add(name, {})
            return self._send(409 if known else 200, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
        if self.path == "/api/validate-yaml":
            return self._send(200, b'{"errors": [], "warnings": []}')
        name = re.sub(r"^/(?:api/models/)?([^/]+/[^/.]+).*", r"\1", self.path)
        if "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if ".onnx" in path else "regular"} for path in asked]
            answer = [{"shouldIgnore": False, **mode} for mode in modes]
            return self._send(200, json.dumps({"files": answer}).encode())
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/put/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode(),
                              {"Content-Type": "application/vnd.git-lfs+json"})  # fmt: skip
        files = dict(self.hub.repositories[name]["main"])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.add(name, files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send(200, json.dumps({"commitUrl": url, "commitOid": commit, "success": True}).encode())

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.uploads[self.path.rpartition("/")[2]] = content
        self._send(200, b"")

    def _send(self, status: int, content: bytes, headers: Any = (), path: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = content[: len(content) // 2]
        if self.hub.cuts.get(path):
            self.hub.cuts[path] -= 1
            self.wfile.write(half)
            self.close_connection = True
        elif path in self.hub.slow:
            self.wfile.write(half)
            threading.Event().wait(300)
        else:
            self.wfile.write(content)


HUB = FakeHub.started()
