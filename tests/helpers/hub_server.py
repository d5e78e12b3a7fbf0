"""A Hub on loopback: what huggingface_hub asks of the real one when it pushes and loads, kept in memory.

Knows regular and LFS files, private repositories, tokens, parent commits, and uploads that are cut off.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = {"good": True, "reader": False}  # token -> may write


class Hub:
    """`repos`: id -> {"private": bool, "commits": [(sha, {path: (bytes, is LFS)})]}; `objects`: LFS oid -> bytes."""

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.cut_off = 0  # how many of the next LFS uploads break in the middle
        self.puts: list[str] = []
        self.before_commit = None  # called between a client's preparations and its commit
        self.on_request = None  # called at every POST and PUT, before it is read

    def files(self, repo: str, revision: str = "main") -> dict[str, tuple[bytes, bool]]:
        commits = self.repos[repo]["commits"]
        return commits[-1][1] if revision == "main" else dict(commits)[revision]

    def head(self, repo: str) -> str:
        return self.repos[repo]["commits"][-1][0]

    def create(self, repo: str, private: bool) -> None:
        self.repos[repo] = {"private": private, "commits": [("0" * 40, {})]}

    def commit(self, repo: str, files: dict[str, tuple[bytes, bool]]) -> str:
        content = json.dumps(
            [self.head(repo), sorted((p, hashlib.sha256(b).hexdigest()) for p, (b, _) in files.items())]
        )
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.repos[repo]["commits"].append((sha, files))
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _answer(self, status: int, body=b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _refused(self, repo: str | None = None, write: bool = False) -> bool:
        """Answers what the Hub answers to those who may not."""
        token = self._token()
        if token is not None and token not in TOKENS:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif repo is not None and (repo not in self.hub.repos or (self.hub.repos[repo]["private"] and token is None)):
            self._answer(404 if token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif write and not TOKENS.get(token):
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        else:
            return False
        return True

    def do_POST(self):
        if self.hub.on_request:
            self.hub.on_request()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if len(body) < int(self.headers["Content-Length"]):  # the client is dead
            self.close_connection = True
            return None
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            if self._refused(write=True):
                return None
            values = json.loads(body)
            repo = f"{values.get('organization') or 'me'}/{values['name']}"
            url = {"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo}
            if repo in self.hub.repos:
                return self._answer(409, {"error": "You already created this model repo", **url})
            self.hub.create(repo, bool(values.get("private") or values.get("visibility") == "private"))
            return self._answer(200, url)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            if self._refused(match[1], write=True):
                return None
            files = json.loads(body)["files"]
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular", f["path"]) for f in files]
            return self._answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            if self._refused(match[1], write=True):
                return None
            objects = []
            for entry in json.loads(body)["objects"]:
                href = f"http://{self.headers['Host']}/lfs/{entry['oid']}"
                known = entry["oid"] in self.hub.objects
                objects.append(entry | ({} if known else {"actions": {"upload": {"href": href}}}))
            return self._answer(
                200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json"
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return None if self._refused(match[1], write=True) else self._commit(match[1], body)
        return self._answer(404, {"error": path})

    def _commit(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        if self.hub.before_commit:
            self.hub.before_commit()
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != self.hub.head(repo):
            return self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(self.hub.files(repo))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.hub.objects[value["oid"]], True)
            else:
                files.pop(value["path"], None)
        sha = self.hub.commit(repo, files)
        url = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
        return self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self):
        if self.hub.on_request:
            self.hub.on_request()
        oid = self.path.removeprefix("/lfs/")
        size = int(self.headers["Content-Length"])
        if self.hub.cut_off:
            self.hub.cut_off -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(size)  # less, if the client is dead
        if hashlib.sha256(data).hexdigest() != oid:
            return self._answer(400, {"error": "not what was announced"})
        self.hub.objects[oid] = data
        self.hub.puts.append(oid)
        self._answer(200)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            if self._refused(match[1]):
                return None
            sha = self.hub.head(match[1]) if match[2] in (None, "main") else match[2]
            files = [{"rfilename": name} for name in self.hub.files(match[1], sha)]
            private = self.hub.repos[match[1]]["private"]
            return self._answer(200, {"id": match[1], "sha": sha, "private": private, "siblings": files})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            if self._refused(match[1]):
                return None
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, (data, _) in self.hub.files(match[1], match[2]).items()
            ]
            return self._answer(200, entries)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return None if self._refused(match[1]) else self._resolve(*match.groups())
        return self._answer(404, {"error": path})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        sha = self.hub.head(repo) if revision == "main" else revision
        files = self.hub.files(repo, sha)
        if name not in files:
            return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data, is_lfs = files[name]
        etag = (hashlib.sha256 if is_lfs else hashlib.sha1)(data).hexdigest()
        return self._answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=sha)

    do_HEAD = do_GET


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that die are part of the tests
            super().handle_error(request, client_address)


@contextmanager
def serve():
    """Yields (hub, its address)."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_with_hub(code: str, address: str, tmp_path, token: str | None = "good") -> subprocess.CompletedProcess:
    """Python of its own, for huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token or "",
    }
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True)
