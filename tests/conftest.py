"""One thread: small tensors gain nothing from more, and kernels' per-thread buffers stay the same on every machine."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
