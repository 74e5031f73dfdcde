"""The kernels of a measured run on the CPU: those whose memory is known, where a model is small enough for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from galore_mem.memory.phases import Work

# Parameters. Without oneDNN a bfloat16 product takes a hundred times as long; with it, scratch space whose size the
# processor decides: some MiB at most (1.6 MiB in a product of 11,008 x 4,096 by 4,096 x 1,024 on AVX-512).
LARGE = 50_000_000
REMARK = "its size asks for oneDNN's kernels, whose scratch space (some MiB) is measured and not predicted"


def large(work: Work) -> bool:
    """Is the model too large for the plain kernels on the CPU?"""
    return work.setup.device == "cpu" and work.model.parameter_count > LARGE


@contextmanager
def chosen_kernels(work: Work) -> Iterator[None]:
    """On the CPU one thread (scratch space grows with threads, and small factorizations lose to them when the machine
    is shared), and no oneDNN but for large models."""
    if work.setup.device != "cpu":
        yield
        return
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=large(work)):
            yield
