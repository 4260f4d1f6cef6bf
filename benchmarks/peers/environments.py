"""A peer's own virtual environment, and a worker process that runs in one."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class PeerError(Exception):
    """A peer could not be installed or loaded, raised while it ran, or found other numbers."""


def environment(peer: str, folder: Path) -> str:
    """The path of the python in the peer's environment, which is made when its requirements are not in it yet."""
    wanted = (HERE / f"{peer}.txt").read_text()
    python, installed = folder / peer / "bin" / "python", folder / peer / "installed.txt"
    if installed.exists() and installed.read_text() == wanted:
        return str(python)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    print(f"{peer}: installing into {folder / peer}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(folder / peer)])
    _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / f"{peer}.txt")])
    installed.write_text(wanted)
    return str(python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"install: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "Error:" in line]
    return (errors or lines or ["no message"])[-1][:200]


class Worker:
    """One worker process; ask() sends a request and returns the answer."""

    def __init__(self, python: str, script: str, folder: Path, threads: int):
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        # Both sides get the same threads; nothing may look for models or telemetry on the network.
        environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        self._printed = tempfile.TemporaryFile("w+")
        read, write = os.pipe()
        self._answers = os.fdopen(read)
        self._process = subprocess.Popen(
            [python, str(HERE / f"{script}.py"), str(folder), str(write)],
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=self._printed,
            text=True,
            env=environ,
            pass_fds=[write],
        )
        os.close(write)
        self.about: dict[str, Any] = {}

    def __enter__(self) -> "Worker":
        try:
            self.about = self._answer()
        except PeerError:
            self._stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()

    def ask(self, do: str, **arguments: str) -> dict[str, Any]:
        """The worker's answer; PeerError when it is an error or the process has ended."""
        self._send({"do": do, **arguments})
        return self._answer()

    def _send(self, request: dict[str, str]) -> None:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the missing answer says why

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            self._printed.seek(0)
            raise PeerError(_last_line(self._printed.read()))
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._send({"do": "quit"})
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._answers, self._printed):
            pipe.close()
