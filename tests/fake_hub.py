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
        return [line for line in self.asked if re.fullmatch(rf"GET .*/resolve/.*{re.escape(name)}", line)]

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

    def do_GET(self) -> None:
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        place = r"(?:/api/models)?/([^/]+/[^/]+)/(resolve|tree|revision)/([^/?]+)/?([^?]*).*"
        match = re.fullmatch(place, self.path)
        name, kind, revision, path = match.groups() if match else ("", "", "", "")
        revisions = hub.repositories.get(name, {})
        allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.page:
            self._send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        elif hub.status:
            self._send(hub.status)
        elif not revisions or (name in hub.private and not allowed):
            self._send(401, headers={"X-Error-Code": "RepoNotFound"})
        elif name in hub.gated and not allowed:
            self._send(401, headers={"X-Error-Code": "GatedRepo"})
        elif revision not in revisions:
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif kind != "resolve":
            listed = [{"type": "file", "path": path, "size": 0, "oid": ""} for path in revisions[revision]]
            info = {"id": name, "sha": commit_of(revisions[revision])}
            self._json(listed if kind == "tree" else info)
        elif path not in revisions[revision]:
            self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            self._file(revisions[revision], path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _file(self, files: Files, path: str) -> None:
        content = files[path]
        etag = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "X-Repo-Commit": commit_of(files)}
        if not path.endswith((".json", ".yaml", ".md")):  # in LFS
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(self.hub.size or len(content))
        if path in self.hub.lies:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, path)

    def do_POST(self) -> None:
        """What an upload asks: a repository, which files go to LFS, where to, and a commit."""
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repositories
            if not known:
                hub.add(name, {})
            self._json({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if ".onnx" in path else "regular" for path in paths}
            answer = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()
            ]
            self._json({"files": answer})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.url}/put/{one['oid']}", "header": {}}}
            self._json({"transfer": "basic", "objects": objects})
        else:
            self._commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)

    def _commit(self, name: str, body: bytes) -> None:
        files = dict(self.hub.repositories[name]["main"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.add(name, files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.uploads[self.path.rpartition("/")[2]] = content
        self._send(200)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/vnd.git-lfs+json"})

    def _send(self, status: int, content: bytes = b"", headers: Any = (), path: str = "") -> None:
        """path: of a file, whose answer may be cut or slow."""
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
