"""Runs the commands shown in the documentation and puts their real output below them.

    python docs/refresh.py [--check] [FILE ...]

A block is fenced as `console` and begins with `$ galore-mem ...`; what follows is what the command printed. With
`--check` nothing is written: exit code 1 and a list if a block differs from what the command prints now.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```console\n\$ (galore-mem [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def output_of(command: str) -> str:
    """What the command prints, standard output and standard error together."""
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name("galore-mem"))
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, check=False)
    return done.stdout


def refreshed(text: str) -> str:
    """The document with every block's output as it is now."""
    return BLOCK.sub(lambda m: f"```console\n$ {m[1]}\n{output_of(m[1])}```", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "files", nargs="*", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    given = parser.parse_args()
    stale = []
    for path in given.files:
        text = path.read_text(encoding="utf-8")
        new = refreshed(text)
        if new != text:
            stale.append(path.name)
            if not given.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'stale' if given.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
