"""The documentation shows what the commands print, and the commands that CI runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_output_in_the_documentation_is_what_the_commands_print() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "refresh.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}run docs/refresh.py"


def test_readme_shows_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install . && galore-mem estimate --model llama-7b --rank 1024" in lines
    assert "pip install -c constraints.txt '.[test]' && pytest" in lines
