"""The quantized moments of torchao's low-bit AdamW, shared by three methods.

torchao 0.18.0, torchao/optim/adam.py (`_new_buffer`) and subclass_{8bit,4bit,fp8}.py: each moment of a
parameter is a tensor subclass holding `codes`, a float32 `scale` per block and, for 8 and 4 bits, a
float32 lookup table `qmap` of its own. Parameters below 4096 elements, or whose size is not a multiple
of the block, keep plain moments in their own format. The ledger names the inner tensors
(`exp_avg.codes`, ...). `step` is a float32 scalar made by `torch.tensor(0.0)`, and so is each group's learning rate:
they stay on the host.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32, DType
from galore_mem.methods.base import Buffer, Job, Trained

VERSION = "torchao 0.18.0"
MIN_QUANTIZED_SIZE = 4096
COMPILED = "temporaries of the step, which torchao compiles: the generated kernels decide them"


def learning_rate(job: Job) -> tuple[Buffer, ...]:
    """The group's, a tensor so that a compiled step need not be compiled again when it changes."""
    return () if job.on_host else (Buffer("param_groups.0.lr", (), FLOAT32),)


def low_bit(p: Trained, job: Job, codes: DType, *, per_code: int, block: int, qmap: int) -> tuple[Buffer, ...]:
    """`step` and two moments, quantized where torchao quantizes.

    `codes` is the format of a stored code, `per_code` how many values share one, `block` the values per
    scale and `qmap` the entries of the lookup table (0: none).
    """
    buffers = [Buffer("step", (), FLOAT32, host=job.on_host)]
    for name in ("exp_avg", "exp_avg_sq"):
        if p.numel < MIN_QUANTIZED_SIZE or p.numel % block:
            buffers.append(Buffer(name, p.shape, p.dtype))
            continue
        shape = p.shape if per_code == 1 else (p.numel // per_code,)
        buffers.append(Buffer(f"{name}.codes", shape, codes))
        buffers.append(Buffer(f"{name}.scale", (p.numel // block,), FLOAT32))
        if qmap:
            buffers.append(Buffer(f"{name}.qmap", (qmap,), FLOAT32))
    return tuple(buffers)
