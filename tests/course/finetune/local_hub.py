"""A Hub on this machine: an HTTP server with the part of the Hub's interface that its libraries use to load by name.

Files, trees and errors are answered as huggingface.co does, large files (parquet, safetensors) by a redirect to
another path; its storage by chunks (Xet) and gated repositories are left out. In another process, because the
libraries read HF_ENDPOINT once:

    with LocalHub() as hub:
        hub.add("dataset", "owner/name", {"data/train.csv": b"…"}, revision="main")
        subprocess.run(…, env=hub.environment(tmp_path))
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

OTHERS = ("http_proxy", "https_proxy", "all_proxy", "transformers_offline", "huggingface_hub_cache")


class LocalHub:
    """`requests` are what was asked, "METHOD path"; the download of a file in `broken`, "COMMIT/path", breaks off."""

    def __init__(self):
        self.revisions: dict[tuple[str, str], dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.broken: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host's name, as with the real Hub

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes] | str | Path, revision: str = "main") -> str:
        """A commit of a "model" or "dataset", with these files or a directory's, to which the revision points."""
        if not isinstance(files, dict):
            top = Path(files)
            files = {p.relative_to(top).as_posix(): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        commit = sha1(kind, name, revision, sorted(files.items()))
        self.revisions.setdefault((kind, name), {})[revision] = commit
        self.commits[commit] = files
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """An environment with this Hub, an own cache and, of the user's, neither proxies nor settings of the Hub."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() not in OTHERS}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, url = self.server.hub, urlsplit(self.path)
        hub.requests.append(f"{self.command} {unquote(url.path)}")
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        if words[0] == "stored":
            return self.send_stored(*words[1:])
        api = words[0] == "api"
        words = words[1:] if api else words
        kind = "dataset" if words[0] == "datasets" else "model"
        words = words[1:] if words[0] == "datasets" or (api and words[0] == "models") else words
        name, rest = "/".join(words[:2]), words[2:]
        if (kind, name) not in hub.revisions:
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        action, revision = (rest + ["revision", "main"])[:2] if len(rest) < 2 else rest[:2]
        revisions = hub.revisions[kind, name]
        commit = revisions.get(revision, revision if revision in revisions.values() else None)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, path = hub.commits[commit], "/".join(rest[2:])
        if action == "resolve" and not api:
            return self.send_file(commit, files, path)
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.send_json({"id": name, "sha": commit, "private": False, "siblings": siblings, "tags": []})
        if action == "tree":
            found = entries(files, path, parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1"))
            if not found and path:
                return self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return self.send_json(found)
        self.refuse(404, "NotFound", "Sorry, we can't find the page you are looking for.")

    do_HEAD = do_GET

    def send_file(self, commit: str, files: dict[str, bytes], path: str):
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", headers)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        if path.endswith((".parquet", ".safetensors")):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(files[path]))}
            return self.answer(302, b"", headers | {"Location": f"{self.server.hub.storage}/stored/{commit}/{path}"})
        self.answer(200, files[path], headers | {"ETag": etag}, f"{commit}/{path}" in self.server.hub.broken)

    def send_stored(self, commit: str, *path: str):
        name = "/".join(path)
        self.answer(200, self.server.hub.commits[commit][name], {}, f"{commit}/{name}" in self.server.hub.broken)

    def send_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str, headers: dict | None = None):
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, (headers or {}) | {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, status: int, body: bytes, headers: dict, broken: bool = False):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/octet-stream"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if broken else body)
        if broken:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


def entries(files: dict[str, bytes], path: str, recursive: bool) -> list[dict]:
    """The files and folders under a path, as the Hub's tree lists them."""
    beginning, found = f"{path}/" if path else "", {}
    for name, content in files.items():
        parts = name.removeprefix(beginning).split("/")
        if not name.startswith(beginning):
            continue
        for depth in range(1, len(parts)):
            folder = beginning + "/".join(parts[:depth])
            found[folder] = {"type": "directory", "oid": sha1(folder), "size": 0, "path": folder}
        found[name] = {"type": "file", "oid": sha1(name, content), "size": len(content), "path": name}
    return [entry for name, entry in found.items() if recursive or "/" not in name[len(beginning) :]]


def sha1(*what) -> str:
    return hashlib.sha1(repr(what).encode()).hexdigest()
