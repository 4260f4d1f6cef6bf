"""A server beside the tests that behaves towards Weights & Biases as a bad one does; and finding its processes."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ANSWERS = {
    "upsertBucket": {
        "bucket": {
            "id": "b",
            "name": "run",
            "displayName": "run",
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": {"id": "p", "name": "vitpatch", "entity": {"id": "e", "name": "somebody"}},
            "historyLineCount": 0,
        },
        "inserted": True,
    },
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None, "features": []},
    "viewer": {"id": "v", "entity": "somebody", "flags": "{}", "username": "somebody", "teams": {"edges": []}},
}
"""What a client needs to hear to begin a run."""


class Server(ThreadingHTTPServer):
    """``manner``: ``silent`` (takes requests and never answers), ``refusing`` (401), ``fading`` (silent once a run
    has begun)."""

    daemon_threads = True

    def __init__(self, manner: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manner, self.asked, self.closing = manner, [], threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        text = body.decode("utf-8", "replace")
        self.server.asked.append(f"{self.path} {text}")
        manner = self.server.manner
        if manner == "silent" or (manner == "fading" and "upsertBucket" not in text and not _opens(text)):
            self.server.closing.wait()
            return
        if manner == "refusing":
            self._say(401, {"errors": [{"message": "user is not logged in"}]})
            return
        self._say(200, {"data": {name: answer for name, answer in ANSWERS.items() if name in text}})

    do_GET = do_PUT = do_POST

    def _say(self, code: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing."""


def _opens(text: str) -> bool:
    return any(name in text for name in ("serverInfo", "viewer"))


@contextmanager
def serving(manner: str):
    """A server of that manner for the length of the block."""
    server = Server(manner)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def services(of: int) -> list[int]:
    """wandb's own processes that are children of the process ``of``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == of and state != "Z" and b"wandb-core" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except OSError:  # it ended while we looked
            continue
    return found
