"""Real text that every Python has: the standard library's own sources as bytes, split by file.

Left out: tests, installed packages, what a build writes for its machine, and generated files (the character tables
of `encodings`, the manual in `pydoc_data`, which alone would be most of the held-out text). A file belongs to the
validation text by the hash of its path, so the split does not depend on the machine.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

SKIPPED = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data")
)
BY_BUILD = ("config-", "_sysconfigdata")  # how these files and folders begin
HELD_OUT = 26  # of 256 values of the hash's first byte: about a tenth of the files


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes (uint8), the number of files of each, and one hash of everything."""

    train: Tensor
    validation: Tensor
    files: tuple[int, int]
    digest: str

    def batches(self, seed: int, count: int, batch_size: int, seq_len: int) -> Iterator[Tensor]:
        """`count` random batches of batch_size x (seq_len + 1), the same ones for every method."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(len(self.train) - seq_len, (batch_size,), generator=generator)
            yield windows(self.train, starts, seq_len)

    def held_out(self, count: int, seq_len: int) -> Tensor:
        """`count` windows spread evenly over the validation text."""
        starts = torch.arange(count) * (len(self.validation) - seq_len - 1) // (count - 1)
        return windows(self.validation, starts, seq_len)

    def described(self) -> dict[str, int | float | str]:
        """For the record."""
        sizes = {"train_bytes": len(self.train), "validation_bytes": len(self.validation)}
        return {"digest": self.digest, **sizes, "unigram_nats": round(self.unigram_entropy(), 5)}

    def unigram_entropy(self) -> float:
        """Nats per byte of the validation text under the training text's byte frequencies (add-one smoothed)."""
        counts = torch.bincount(self.train.int(), minlength=256).double() + 1
        seen = torch.bincount(self.validation.int(), minlength=256).double()
        return -float((seen * (counts / counts.sum()).log()).sum() / seen.sum())


def windows(text: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    """Rows of seq_len + 1 bytes: inputs, and the targets one further."""
    return text[starts[:, None] + torch.arange(seq_len + 1)].long()


def sources(root: Path) -> list[Path]:
    """Relative paths in a fixed order."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (p for p in found if not any(part in SKIPPED or part.startswith(BY_BUILD) for part in p.parts))
    return sorted(kept, key=Path.as_posix)


def standard_library() -> Corpus:
    """The corpus of the running Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    whole = sha256()
    for path in sources(root):
        name, text = path.as_posix().encode(), (root / path).read_bytes()
        whole.update(name + b"\0" + text)
        texts[sha256(name).digest()[0] < HELD_OUT].append(text)
    train, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in texts)
    return Corpus(train, validation, (len(texts[0]), len(texts[1])), whole.hexdigest()[:16])
