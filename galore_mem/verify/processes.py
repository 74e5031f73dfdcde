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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Timer
from typing import NamedTuple, Protocol

# (-P: a user's folder may hold files with the names of modules)
WORKER = (sys.executable, "-P", "-m", "galore_mem.verify.worker")
SERVER = (sys.executable, "-P", "-m", "galore_mem.verify.server")
# glibc's malloc keeps freed blocks below a limit that grows to 32 MiB: of LLaMA-7B's steps, 2 GiB that nothing uses.
# With a fixed limit (bytes) a tensor that is freed leaves the process.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
IMPORTS = 300.0  # seconds that a server has to begin a case


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal that killed it), and what it said."""

    code: int
    out: str
    err: str
    late: bool = False


class Starter(Protocol):
    """Runs one process after another. `stop` may come from another thread: it kills what runs, and nothing runs
    afterwards."""

    def run(self, given: str, timeout: float) -> Ended: ...

    def stop(self) -> None: ...


STOPPED = Ended(-signal.SIGTERM, "", "stopped")


class Group:
    """A process with whatever it starts: they end together. Nothing is started once it was stopped."""

    def __init__(self, command: Sequence[str], err: int) -> None:
        self._command, self._err = command, err
        self._lock = Lock()
        self._stopped = False
        self.process: subprocess.Popen[str] | None = None

    def started(self) -> subprocess.Popen[str] | None:
        """The process, begun if there is none that lives; None once it was stopped."""
        with self._lock:
            if self._stopped:
                return None
            if self.process is None or self.process.poll() is not None:
                pipe, env = subprocess.PIPE, {**RETURNED, **os.environ}
                self.process = subprocess.Popen(
                    self._command, stdin=pipe, stdout=pipe, stderr=self._err, text=True, start_new_session=True, env=env
                )
            return self.process

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        self.kill()


class Fresh:
    """A new interpreter for each case."""

    def __init__(self, arguments: Sequence[str] = (), command: Sequence[str] = WORKER) -> None:
        self._group = Group((*command, *arguments), subprocess.PIPE)

    def run(self, given: str, timeout: float) -> Ended:
        """`given` on its stdin; killed after `timeout` seconds."""
        process = self._group.started()
        if process is None:
            return STOPPED
        late = False
        with process:
            try:
                out, err = process.communicate(given, timeout)
            except subprocess.TimeoutExpired:
                late = True
                self._group.kill()
                out, err = process.communicate()
            except BaseException:  # Ctrl-C too: no process is left
                self._group.kill()
                raise
        return Ended(process.returncode, out, err, late)

    def stop(self) -> None:
        self._group.stop()


class Forked:
    """Forks of a process that has imported what cases need. It is started with the first case, and again if it died."""

    def __init__(self, arguments: Sequence[str] = (), command: Sequence[str] = SERVER) -> None:
        self._group = Group((*command, *arguments), subprocess.DEVNULL)
        self._case: int | None = None  # the process of the case that runs: a group of its own

    def run(self, given: str, timeout: float) -> Ended:
        """`given` on its stdin; killed after `timeout` seconds."""
        server = self._group.started()
        if server is None:
            return STOPPED
        assert server.stdin is not None
        with tempfile.TemporaryDirectory(prefix="galore-mem-") as folder:
            files = {name: str(Path(folder, name)) for name in ("in", "out", "err")}
            Path(files["in"]).write_text(given, encoding="utf-8")
            try:
                server.stdin.write(json.dumps({**files, "seconds": timeout}) + "\n")
                server.stdin.flush()
                with ended_after(IMPORTS, self._group.kill):
                    self._case = self._said(server, "pid")
                with ended_after(timeout, self._kill) as late:
                    code = self._said(server, "code")
                self._case = None
                return Ended(code, read(files["out"]), read(files["err"]), late.is_set())
            except (BrokenPipeError, json.JSONDecodeError, KeyError):  # it died
                self._group.kill()
                return Ended(server.wait(), read(files["out"]), read(files["err"]) or "the server of forks ended")

    def _said(self, server: subprocess.Popen[str], what: str) -> int:
        assert server.stdout is not None
        return int(json.loads(server.stdout.readline())[what])

    def _kill(self) -> None:
        if self._case is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._case, signal.SIGKILL)

    def stop(self) -> None:
        self._kill()
        self._group.stop()


@contextmanager
def ended_after(seconds: float, end: Callable[[], None]) -> Iterator[Event]:
    """Calls `end` if this takes longer; the event says whether it was."""
    late = Event()

    def now() -> None:
        late.set()
        end()

    timer = Timer(seconds, now)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def read(path: str) -> str:
    """What is in a file; nothing where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def starter(device: str, arguments: Sequence[str] = ()) -> Starter:
    """Forks, but where a driver that imports may have touched does not survive a fork (CUDA), or nothing forks."""
    return Forked(arguments) if device == "cpu" and hasattr(os, "fork") else Fresh(arguments)
