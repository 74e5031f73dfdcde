"""The drift alarm's record: what this torch and transformers save and allocate, for every family and optimizer.

    python benchmarks/drift.py [--check] [SUBJECT ...]

Shows what differs from tests/data/drift/ and writes it there; with `--check` only shows it. A subject is a family, or
`llama-lora` or `optimizers`; without any all are renewed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from drift_record import FOLDER, Record, differences, installed, read, text_of
from drift_subjects import SUBJECTS, record


def renewed(name: str, *, check: bool) -> str:
    """What became of a subject's file."""
    subject, path = SUBJECTS[name], FOLDER / f"{name}.txt"
    now = Record(installed(subject.packages), record(subject))
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    after = text_of(now)
    if not check and after != before:
        path.write_text(after, encoding="utf-8")
    if not before:
        return f"{name}: new"
    if after == before:
        return f"{name}: the same"
    return differences(name, read(before), now) or f"{name}: the same but for versions and the order of lines"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT")
    given = parser.parse_args()
    unknown = [name for name in given.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"unknown subject {unknown[0]!r}; known: {', '.join(SUBJECTS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in given.subjects or SUBJECTS:
        print(renewed(name, check=given.check), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
