"""AdamW with 8-bit block-wise quantized moments.

Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
Blocks of 256 values share one float32 maximum (`absmax`); N is the number of elements.

bitsandbytes 0.50.2 (bitsandbytes/optim/optimizer.py, Optimizer2State.init_state): parameters of at least
4096 elements, embeddings included, keep `state1`, `state2` in uint8 and ceil(N/256) maxima each;
smaller ones keep both moments in float32, without maxima, whatever their own format. The two lookup
tables exist once per optimizer. `step` is a Python int. Its CUDA kernels allocate nothing; its CPU
kernels work on float32 copies of whole tensors. torchao: see `torchao.py`.
"""

from __future__ import annotations

from dataclasses import replace

from galore_mem.dtypes import FLOAT32, UINT8
from galore_mem.memory.tape import Shape
from galore_mem.methods import torchao
from galore_mem.methods.base import (
    Buffer,
    Citation,
    Implementation,
    Job,
    Method,
    Slot,
    Slots,
    Trained,
    nothing_shared,
)
from galore_mem.methods.eager import as_float32
from galore_mem.units import ceil_div

BLOCK = 256
MIN_8BIT_SIZE = 4096
MIN_PAGED_SIZE = 100_000


def blockwise(shape: Shape, numel: int, *, host: bool = False) -> tuple[Buffer, ...]:
    """The two states bitsandbytes keeps for a tensor of this shape."""
    if numel < MIN_8BIT_SIZE:
        return tuple(Buffer(name, shape, FLOAT32) for name in ("state1", "state2"))
    blocks = (ceil_div(numel, BLOCK),)
    return (
        Buffer("state1", shape, UINT8, host=host),
        Buffer("state2", shape, UINT8, host=host),
        Buffer("absmax1", blocks, FLOAT32),
        Buffer("absmax2", blocks, FLOAT32),
    )


def state(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`state1`, `state2` and, from 4096 elements on, `absmax1`, `absmax2`."""
    return blockwise(p.shape, p.numel)


def state_paged(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """As `state`; from 100,000 elements on, both states are in CUDA managed memory (get_state_buffer)."""
    return blockwise(p.shape, p.numel, host=job.on_host and p.numel >= MIN_PAGED_SIZE)


def lookup_tables(job: Job) -> tuple[Buffer, ...]:
    """The signed and the unsigned dynamic map, `state[p]["qmap1"]` and `["qmap2"]` of every parameter."""
    return Buffer("qmap1", (256,), FLOAT32), Buffer("qmap2", (256,), FLOAT32)


# where bitsandbytes' tables are found of an optimizer whose only parameter is not quantized
UNUSED = {"qmap1": "name2qmap.dynamic", "qmap2": "name2qmap.udynamic"}


def with_own_tables(code: Implementation) -> Implementation:
    """The code in a layer-wise update: an optimizer for each parameter, and each with what it shares of its own."""

    def own(p: Trained, job: Job) -> tuple[Buffer, ...]:
        found, tables = code.state(p, job), code.shared(job)
        if all(b.name != "absmax1" for b in found):
            tables = tuple(replace(b, name=UNUSED.get(b.name, b.name)) for b in tables)
        return *found, *tables

    return replace(code, state=own, shared=nothing_shared)


def update_8bit(slot: Slot, shape: Shape) -> None:
    """_optimizer_update_8bit_blockwise_cpu (bitsandbytes/backends/cpu/ops.py): both states dequantized,
    a float32 gradient and, for a narrower one, parameter; `denom = (state2.sqrt() / c).add_(eps)`."""
    state1, state2 = slot.new(shape, FLOAT32), slot.new(shape, FLOAT32)
    grad = slot.new(shape, FLOAT32, as_float32(slot, slot.grad))
    param = as_float32(slot, slot.weight)
    denom = slot.new(shape, FLOAT32, slot.new(shape, FLOAT32))
    for _ in ("state1", "state2"):
        codes, absmax = slot.new(shape, UINT8), slot.new((ceil_div(slot.param.numel, BLOCK),), FLOAT32)
        del codes, absmax
    del state1, state2, grad, param, denom


def update_32bit(slot: Slot, shape: Shape) -> None:
    """_optimizer_update_32bit_cpu: a float32 gradient and, for a narrower one, parameter;
    `update = state1 / (state2.sqrt() + eps)`."""
    grad = slot.new(shape, FLOAT32, as_float32(slot, slot.grad))
    param = as_float32(slot, slot.weight)
    denom = slot.new(shape, FLOAT32, slot.new(shape, FLOAT32))
    update = slot.new(shape, FLOAT32, denom)
    del grad, param, denom, update


def step(slots: Slots, job: Job, refresh: bool) -> None:
    """CUDA kernels update in place (bitsandbytes/backends/cuda/ops.py); the CPU kernels are written in torch."""
    if job.device != "cpu":
        return
    for slot in slots:
        update = update_32bit if slot.param.numel < MIN_8BIT_SIZE else update_8bit
        update(slot, slot.param.shape)


def state_torchao(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`step`; for each moment uint8 codes, N/256 scales and a table of 256 entries."""
    return torchao.low_bit(p, job, UINT8, per_code=1, block=256, qmap=256)


def state_paper(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """Two moments at one byte per element."""
    return Buffer("exp_avg", p.shape, UINT8), Buffer("exp_avg_sq", p.shape, UINT8)


BITSANDBYTES = Implementation(
    name="bitsandbytes", version="bitsandbytes 0.50.2", source="bitsandbytes/optim/optimizer.py:Optimizer2State",
    state=state, step=step, shared=lookup_tables, one_each=True,
    equations={"other": "2·m·n at 1 byte + 2·⌈m·n/256⌉ at 4 bytes; below 4096 elements 2·m·n at 4 bytes"},
)  # fmt: skip
PAGED = Implementation(
    name="bitsandbytes-paged", version="bitsandbytes 0.50.2", source="bitsandbytes/optim/optimizer.py:get_state_buffer",
    state=state_paged, step=step, shared=lookup_tables, one_each=True, equations=BITSANDBYTES.equations,
    notes=("states of 100,000 elements and more are in managed memory, which torch's allocator does not see",),
    not_counted=("pages of managed memory that the driver moves to the GPU during the step",),
)  # fmt: skip
TORCHAO = Implementation(
    name="torchao", version=torchao.VERSION, source="torchao/optim/adam.py:AdamW8bit, subclass_8bit.py",
    state=state_torchao, shared=torchao.learning_rate, one_each=True,
    equations={"other": "2·m·n at 1 byte + 2·(m·n/256 + 256) at 4 bytes; unquantized unless 256 divides m·n >= 4096"},
    not_counted=(torchao.COMPILED,),
)  # fmt: skip

METHOD = Method(
    name="adamw-8bit",
    title="8-bit AdamW",
    citation=Citation(
        "8-bit Optimizers via Block-wise Quantization", "Dettmers, Lewis, Shleifer, Zettlemoyer", "arXiv:2110.02861"
    ),
    paper=Implementation(
        "paper", "arXiv:2110.02861", "two 8-bit states, 2mn bytes; scales neglected", state_paper,
        equations={"other": "2·m·n at 1 byte"},
    ),
    implementations=(BITSANDBYTES, PAGED, TORCHAO),
)  # fmt: skip
