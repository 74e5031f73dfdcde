"""Others' estimators on the runs that were measured on GPUs: what they say, beside what was measured.

    python benchmarks/peers [--only vramcalc fitcheck torch-preflight ftuneai] [--again]

Each peer gets a virtual environment of its own with pinned packages (pip, the only thing that uses a network), and
answers there, offline. What was answered is in a record (record.jsonl beside this file) and is not asked again unless
the peer's version or the way it is asked changed; `--again` asks anew (after a change of ask.py, say).
`python benchmarks/accuracy` makes the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent / "accuracy"))  # for its rows and its record

from peers import METHODS, PEERS, Ask, Peer  # noqa: E402  # the folder is on the path from here on
from record import append, good, read, tidy  # noqa: E402  # the folder is on the path from here on
from rows import Run, runs, write_cache  # noqa: E402  # the folder is on the path from here on


def python_of(peer: Peer, folder: Path) -> Path:
    """The interpreter of the peer's environment, which is made where it is not there with these packages."""
    home = folder / f"{peer.package}-{peer.version}"
    done, wanted = home / "requirements.txt", "\n".join(peer.requirements) + "\n"
    python = home / "bin" / "python"
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        venv.create(home, with_pip=True, clear=True)
        # wheels only: nothing of the peer's is built or run to install it
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        subprocess.run([*pip, *peer.requirements], check=True)
        done.write_text(wanted, encoding="utf-8")
    return python


def answers(name: str, python: Path, cache: Path, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of all questions in one process of the peer's interpreter, which sees no network and no settings of the user."""
    around = {"PATH": os.defpath, "HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [python, "-I", HERE / "ask.py", name]
    done = subprocess.run(command, input=json.dumps(asked), env=around, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} could not be asked: {done.stderr.strip()[-300:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def questions(peer: Peer, wanted: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Of each run, what the record says of it before the peer has been asked."""
    for run in wanted:
        asked = peer.ask(run) if run.method in METHODS else f"no {run.method}"
        facts = {
            "title": run.title, "gpu": run.gpu, "peak_allocated_bytes": run.peak_allocated_bytes,
            "device_bytes": run.device_bytes,
        }  # fmt: skip
        if isinstance(asked, Ask):
            yield run, {**facts, "settings": dict(asked.settings), "differs": list(asked.differs)}
        else:
            yield run, {**facts, "refused": asked}


def lines(name: str, wanted: Sequence[Run], known: Mapping[tuple[str, str], Any], folder: Path) -> Iterator[Any]:
    """New lines of the record for this peer."""
    peer = PEERS[name]
    new = []
    for run, said in questions(peer, wanted):
        line = known.get((name, run.key))
        if not good(line) or line["version"] != peer.version or not said.items() <= line["found"].items():
            new.append((run, said))
    asked = [(run, said) for run, said in new if "settings" in said]
    found = {}
    if asked:
        cache = folder / "hub"
        write_cache(cache, (run for run, _ in asked))
        given = [
            {
                "model": run.model, "config": dict(run.config), "parameters": run.parameters, "adapters": run.adapters,
                "gpu": run.gpu, "settings": said["settings"],
            }
            for run, said in asked
        ]  # fmt: skip
        told = answers(name, python_of(peer, folder), cache, given)
        found = {run.key: one for (run, _), one in zip(asked, told, strict=True)}
    date = str(datetime.date.today())
    for run, said in new:
        all_said = {**said, **found.get(run.key, {})}
        yield {"part": name, "key": run.key, "version": peer.version, "date": date, "found": all_said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PEERS, default=tuple(PEERS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--rows", type=Path, help="a file of runs (default: the accuracy suite's)")
    parser.add_argument("--record", type=Path, default=HERE / "record.jsonl")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "galore-mem-peers")
    given = parser.parse_args()
    wanted = list(runs(given.rows))
    known = {} if given.again else read(given.record)
    for name in given.only:
        for line in lines(name, wanted, known, given.environments):
            append(given.record, line)
    tidy(given.record, [(name, run.key) for name in PEERS for run in wanted])
    for name in PEERS:
        found = [line["found"] for (part, _), line in read(given.record).items() if part == name]
        kinds = ("allocated_bytes", "answered"), ("refused", "refused"), ("failed", "failed")
        told = ", ".join(f"{sum(key in one for one in found)} {word}" for key, word in kinds)
        print(f"{name} {PEERS[name].version}: {told}", file=sys.stderr)


if __name__ == "__main__":
    main()
