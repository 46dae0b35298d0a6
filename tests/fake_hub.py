"""A small hub on loopback, as far as the real client asks: datasets, commits, large files, redirects and ranges."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 300
"""Bytes from which on a file is kept apart."""


class Hub:
    """What it holds: datasets, each the list of its commits; large files by their SHA-256."""

    def __init__(self) -> None:
        self.datasets: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.full = False

    def files(self, name: str) -> dict[str, bytes]:
        return self.datasets[name][-1]


class HubHandler(BaseHTTPRequestHandler):
    """Answers the real client."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_arguments: Any) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def tell(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == "Bearer hf_right":
            return True
        self.tell({"error": "Invalid credentials"}, 401)
        return False

    def do_POST(self) -> None:
        body = self.body()
        if not self.allowed():
            return
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            status = 409 if name in self.hub.datasets else 200
            self.hub.datasets.setdefault(name, [{}])
            self.hub.private.setdefault(name, said.get("private", False) or said.get("visibility") == "private")
            self.tell({"url": f"{self.base}/datasets/{name}"}, status)
        elif path == "/api/validate-yaml":
            self.tell({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self.mode(f["size"]), "shouldIgnore": False} for f in files]
            self.tell({"files": modes})
        elif re.fullmatch(r"/datasets/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self.tell({"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]})
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/main", path):
            if self.hub.full:
                self.tell({"error": "Storage quota exceeded"}, 403)
            else:
                self.commit(match[1], body)

    def mode(self, size: int) -> str:
        return "lfs" if size >= LARGE else "regular"

    def place(self, asked: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.hub.large:
            found["actions"] = {"upload": {"href": f"{self.base}/large/{asked['oid']}"}}
        return found

    def commit(self, name: str, body: bytes) -> None:
        files = dict(self.hub.files(name))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.datasets[name].append(files)
        self.tell({"commitUrl": f"{self.base}/datasets/{name}/commit/x", "commitOid": self.commit_id(name)})

    def commit_id(self, name: str) -> str:
        return f"{len(self.hub.datasets[name]) - 1:040x}"

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.large[hashlib.sha256(data).hexdigest()] = data
        self.tell({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            self.ranged(self.hub.large[match[1]])
            return
        if not self.allowed():
            return
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/tree/.*)?", path):
            if match[1] not in self.hub.datasets:
                self.tell({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif match[2]:
                files = self.hub.files(match[1]).items()
                self.tell([{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files])
            else:
                self.tell({"id": match[1], "sha": self.commit_id(match[1]), "private": True, "tags": []})
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.*)", path):
            data = self.hub.datasets[match[1]][int(match[2], 16)].get(match[3])
            if data is None:
                self.tell({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            elif self.mode(len(data)) == "lfs":
                self.tell(b"", 302, Location=f"{self.base}/large/{hashlib.sha256(data).hexdigest()}")
            else:
                self.ranged(data)

    def ranged(self, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self.tell(data)
            return
        start = int(match[1])
        self.tell(data[start:], 206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
