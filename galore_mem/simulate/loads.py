"""How a model comes to the card before its first step, as the allocator sees it: what a load makes and gives back
decides which blocks the run finds, hence what is reserved and how much of its blocks tensors leave unused. No torch.

What stays is what the trace has; its order and what lies there for a while are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, groupby
from typing import NamedTuple

from galore_mem.allocator.events import Alloc, EmptyCache, Event, Free
from galore_mem.memory.tensor import WEIGHTS
from galore_mem.setup import LOADS
from galore_mem.simulate.result import LOAD
from galore_mem.simulate.trace import Allocation, Trace

OWN = 1 << 40  # numbers from here on are of blocks that only the load has
TRUNK, ADAPTER, QUANTIZED = "base_model.model.", ".lora_", "uint8"
EMPTIES_FROM = (0, 20)  # peft: prepare_model_for_kbit_training empties the cache (pull request 3293)


class Read(NamedTuple):
    """How a quantized model is read: bytes of a number in the format that is read, and peft's release."""

    width: int
    peft: str


class Kept(NamedTuple):
    """A tensor that stays: its number in the trace, and what the trace says of it."""

    number: int
    one: Allocation

    @property
    def name(self) -> str:
        """The parameter's name in the checkpoint."""
        return self.one.name.removeprefix(TRUNK).replace(".base_layer.", ".")

    @property
    def weight(self) -> bool:
        """Is it of the checkpoint? (Not a buffer that the model computes, nor an adapter.)"""
        return self.one.category == WEIGHTS and ADAPTER not in self.name and self.name.endswith((".weight", ".bias"))


def stays(trace: Trace, begin: int) -> list[Kept]:
    return [Kept(i, trace.allocations[i]) for i in trace.alive(begin - 1)]


def loaded(trace: Trace, begin: int, load: str, read: Read | None) -> list[int]:
    """The events of a model's way to the card (`galore_mem.setup.LOADS`; `read`: it is quantized meanwhile), of which
    the trace has what stays before event number `begin`, without kernels' own buffers. What only the load has is added
    to its allocations."""
    tensors = [one for one in stays(trace, begin) if not one.one.kernel]
    made: list[int] = []
    numbers: dict[int, int] = {}
    for event in quantized(tensors, *read) if read is not None else WAYS[load](tensors):
        if isinstance(event, Alloc):
            if event.id >= OWN:
                numbers[event.id] = len(trace.allocations)
                trace.allocations.append(Allocation(event.size, "from_pretrained", "(load)", LOAD))
            made.append(numbers.get(event.id, event.id))
        elif isinstance(event, Free):
            made.append(~numbers.get(event.id, event.id))
        else:
            trace.emptied.append(len(made))
    return made


def to_device(kept: Sequence[Kept]) -> Iterator[Event]:
    """`model.to(device)`: tensor by tensor, in the model's order."""
    for one in kept:
        yield Alloc(one.number, one.one.nbytes)


def warmed(kept: Sequence[Kept]) -> Iterator[Event]:
    """A block of all weights' bytes is taken and given back first, from which they are then cut (transformers,
    modeling_utils.py, caching_allocator_warmup)."""
    yield from _block(sum(one.one.nbytes for one in kept if one.weight))
    yield from to_device(kept)


WAYS = dict(zip(LOADS, (to_device, warmed), strict=True))


def _block(nbytes: int) -> Iterator[Event]:
    yield Alloc(OWN, nbytes // 2 * 2)  # it is a tensor of 16-bit numbers
    yield Free(OWN)


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """The order in which weights are read (core_model_loading.py, dot_natural_key): by parts between dots, numbers as
    numbers."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def quantized(kept: Sequence[Kept], width: int, peft: str) -> Iterator[Event]:
    """from_pretrained with a BitsAndBytesConfig, then prepare_model_for_kbit_training, then the adapters. `width`:
    bytes of a number in the format of the weights that are read.

    Weight by weight in the checkpoint's order (core_model_loading.py; without threads where it quantizes, pull request
    44576): a matrix in 16 bits, its scales and codes (quantize_4bit), and the matrix goes. What is not quantized stays
    in 16 bits until it is cast to float32, each in turn.
    """
    rows = [one for one in kept if one.weight]
    groups = {name: list(group) for name, group in groupby(sorted(rows, key=lambda k: natural(k.name)), _name)}
    yield from _block(sum(_read(group, width, codes=True) for group in groups.values()))
    number = count(OWN + 1)
    narrow: dict[str, int] = {}
    for name, group in groups.items():
        narrow[name] = next(number)
        yield Alloc(narrow[name], _read(group, width))
        if _is_quantized(group):
            wide = _wide_scales(group)
            if wide:
                yield Alloc(scales := next(number), wide)
            yield from to_device(group)
            if wide:
                yield Free(scales)
            yield Free(narrow.pop(name))
    for one in kept:
        if one.name in narrow:
            yield Alloc(one.number, one.one.nbytes)
            yield Free(narrow[one.name])
    if tuple(int(part) for part in peft.split(".")[:2]) >= EMPTIES_FROM:
        yield EmptyCache()
    yield from to_device([one for one in kept if not one.weight])


def _name(one: Kept) -> str:
    return one.name


def _is_quantized(group: Sequence[Kept]) -> bool:
    return any(one.one.dtype == QUANTIZED for one in group)


def _wide_scales(group: Sequence[Kept]) -> int:
    """Bytes of the float32 scales that are there until they are quantized too; none where they stay."""
    coded = [one.one.nbytes for one in group if one.one.dtype == QUANTIZED]
    return 4 * min(coded) if len(coded) > 1 else 0


def _read(group: Sequence[Kept], width: int, *, codes: bool = False) -> int:
    """Bytes of a weight as it is read; `codes`: as what it is to become counts (param_element_size: half a byte)."""
    if not _is_quantized(group):
        return sum(one.one.nbytes for one in group) // 4 * width
    packed = max(one.one.nbytes for one in group if one.one.dtype == QUANTIZED)
    return packed if codes else packed * 2 * width
