"""A hub on this machine: the few routes of huggingface.co's HTTP interface that loading a model or data set takes."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@contextmanager
def serving(cache: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the repositories of a hub's cache; (its address, the paths that are asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def do_POST(self):
            self.answer()

        def log_message(self, *everything):
            pass

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if path == "/":
                self.send(b"")
            elif found := API.match(path):
                self.of_repository(*found.groups(), body)
            elif found := FILE.match(path):
                self.file(*found.groups())
            else:
                self.missing("EntryNotFound")

        def snapshot(self, kind, name):
            root = cache / f"{kind}--{name.replace('/', '--')}"
            if not root.is_dir():
                return self.missing("RepoNotFound")
            return root / "snapshots" / (root / "refs" / "main").read_text()

        def of_repository(self, kind, name, what, revision, below, body):
            if (folder := self.snapshot(kind, name)) is None:
                return None
            names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if what == "tree":
                every = "recursive=true" in urlsplit(self.path).query.lower()
                top = folder / (below or "")
                inside = sorted(top.rglob("*") if every else top.glob("*"))
                return self.json([entry(folder, str(file.relative_to(folder))) for file in inside])
            if what == "paths-info":
                wanted = self.wanted(body)
                return self.json([entry(folder, n) for n in wanted if (folder / n).exists()])
            about = {"id": name, "sha": folder.name, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self.json(about | {"siblings": [{"rfilename": n} for n in names]})

        def wanted(self, body):
            if self.headers.get("content-type", "").startswith("application/json"):
                return json.loads(body)["paths"]
            return parse_qs(body.decode())["paths"]

        def file(self, is_data, name, revision, path):
            if (folder := self.snapshot("datasets" if is_data else "models", name)) is None:
                return
            if not (folder / path).is_file():
                self.missing("EntryNotFound")
                return
            content = (folder / path).read_bytes()
            headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": folder.name, "Accept-Ranges": "bytes"}
            code = 200
            if asked_for := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("range") or ""):
                first, last = int(asked_for[1]), int(asked_for[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                content, code = content[first : last + 1], 206
            self.send(content, code, headers)

        def missing(self, code):
            self.send(b"{}", 404, {"X-Error-Code": code})

        def json(self, value):
            self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

        def send(self, content, code=200, headers=None):
            self.send_response(code)
            for key, value in {"Content-Length": len(content), **(headers or {})}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(folder: Path, name: str) -> dict:
    """A file, or a folder, as the hub lists it."""
    path = folder / name
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": etag(content), "size": len(content)}


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
