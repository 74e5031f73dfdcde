"""Processes for cases: each case has one of its own, so what it leaves behind, or how it dies, does not reach the next.
They are sessions of their own: a terminal's Ctrl-C reaches who started them, and that ends them.

`Fresh` starts an interpreter for each. `Forked` keeps one that has torch imported and forks for each case: most of a
small case's time is imports. No torch in here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Timer
from typing import NamedTuple, Protocol

WORKER = (sys.executable, "-m", "galore_mem.verify.worker")
SERVER = (sys.executable, "-m", "galore_mem.verify.server")
# glibc's malloc keeps freed blocks below a limit that grows to 32 MiB: of LLaMA-7B's steps, 2 GiB that nothing uses.
# With a fixed limit (bytes) a tensor that is freed leaves the process.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal that killed it), and what it said."""

    code: int
    out: str
    err: str
    late: bool = False


class Starter(Protocol):
    """Runs one process after another. `stop` may come from another thread: it kills what runs."""

    def run(self, given: str, timeout: float) -> Ended: ...

    def stop(self) -> None: ...


class Fresh:
    """A new interpreter for each case."""

    def __init__(self, arguments: Sequence[str] = (), command: Sequence[str] = WORKER) -> None:
        self._command = (*command, *arguments)
        self._process: subprocess.Popen[str] | None = None

    def run(self, given: str, timeout: float) -> Ended:
        """`given` on its stdin; killed after `timeout` seconds."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
            env={**RETURNED, **os.environ},
        ) as process:
            self._process = process
            late = False
            try:
                out, err = process.communicate(given, timeout)
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
                out, err = process.communicate()
            except BaseException:
                process.kill()
                raise
        return Ended(process.returncode, out, err, late)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()


class Forked:
    """Forks of a process that has imported what cases need. It is started with the first case, and again if it died."""

    def __init__(self, arguments: Sequence[str] = (), command: Sequence[str] = SERVER) -> None:
        self._command = (*command, *arguments)
        self._server: subprocess.Popen[str] | None = None

    def run(self, given: str, timeout: float) -> Ended:
        """`given` on its stdin; killed after `timeout` seconds (a fork also ends by itself if this process is gone)."""
        server = self._alive()
        assert server.stdin is not None
        with tempfile.TemporaryDirectory(prefix="galore-mem-") as folder:
            files = {name: str(Path(folder, name)) for name in ("in", "out", "err")}
            Path(files["in"]).write_text(given, encoding="utf-8")
            try:
                server.stdin.write(json.dumps({**files, "seconds": timeout}) + "\n")
                server.stdin.flush()
                code, late = self._wait(server, timeout)
            except (BrokenPipeError, json.JSONDecodeError, KeyError):  # it died
                server.kill()
                code, late = server.wait(), False
            out, err = (read(files[name]) for name in ("out", "err"))
        return Ended(code, out, err, late)

    def _wait(self, server: subprocess.Popen[str], timeout: float) -> tuple[int, bool]:
        assert server.stdout is not None
        pid = int(json.loads(server.stdout.readline())["pid"])
        late = Event()

        def end() -> None:
            late.set()
            os.kill(pid, signal.SIGKILL)

        timer = Timer(timeout, end)
        timer.daemon = True
        timer.start()
        try:
            return int(json.loads(server.stdout.readline())["code"]), late.is_set()
        finally:
            timer.cancel()

    def _alive(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                env={**RETURNED, **os.environ},
            )
        return self._server

    def stop(self) -> None:
        if self._server is not None and self._server.poll() is None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()


def read(path: str) -> str:
    """What is in a file; nothing where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def starter(device: str, arguments: Sequence[str] = ()) -> Starter:
    """Forks, but where a driver that imports may have touched does not survive a fork (CUDA), or nothing forks."""
    return Forked(arguments) if device == "cpu" and hasattr(os, "fork") else Fresh(arguments)
