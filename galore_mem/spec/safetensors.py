"""Headers of safetensors files: names, shapes and formats without reading, or trusting, any data.

Layout of a file: 8 bytes little-endian length of the header, the header (a JSON object: tensor name -> dtype, shape,
data_offsets), then the data. As in the reference reader, the data must be covered exactly: no overlap, no hole, nothing
after the last tensor. Source: https://github.com/huggingface/safetensors, README and `safetensors/src/tensor.rs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from galore_mem.errors import InputError, unknown
from galore_mem.spec.files import open_file, parse_object, read_object, read_some, shown, shown_path
from galore_mem.spec.model import Shape
from galore_mem.units import MIB, ceil_div

HEADER_LIMIT = 100_000_000  # bytes, the reference reader's limit
INDEX_LIMIT = 64 * MIB
_MAX_DIMENSIONS = 64
_MAX_NAME = 512
_MAX_ELEMENTS = 2**63 - 1
_METADATA = "__metadata__"
_LFS = b"version https://git-lfs"


class Format(NamedTuple):
    """A dtype of the file format: torch's name, bits of an element, and can a parameter be trained in it?"""

    name: str
    bits: int
    trainable: bool = False


FORMATS: Mapping[str, Format] = {
    "F64": Format("float64", 64, True),
    "F32": Format("float32", 32, True),
    "F16": Format("float16", 16, True),
    "BF16": Format("bfloat16", 16, True),
    "C64": Format("complex64", 64, True),
    "F8_E4M3": Format("float8_e4m3fn", 8, True),
    "F8_E5M2": Format("float8_e5m2", 8, True),
    "F8_E4M3FNUZ": Format("float8_e4m3fnuz", 8, True),
    "F8_E5M2FNUZ": Format("float8_e5m2fnuz", 8, True),
    "F8_E8M0": Format("float8_e8m0fnu", 8),  # scales of microscaling formats
    "F6_E2M3": Format("float6_e2m3", 6),
    "F6_E3M2": Format("float6_e3m2", 6),
    "F4": Format("float4_e2m1fn", 4),
    "I64": Format("int64", 64),
    "U64": Format("uint64", 64),
    "I32": Format("int32", 32),
    "U32": Format("uint32", 32),
    "I16": Format("int16", 16),
    "U16": Format("uint16", 16),
    "I8": Format("int8", 8),
    "U8": Format("uint8", 8),
    "BOOL": Format("bool", 8),
}


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its name, its shape and how it is stored."""

    name: str
    shape: Shape
    format: Format


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file, in the order of their data. Raises `InputError`.

    Reads the header only, whatever the size of the file.
    """
    file, size = open_file(path)
    with file:
        header = _header_bytes(file, size, path)
    where = shown_path(path)
    if not header.startswith(b"{"):
        raise InputError(f"{where} is not safetensors: its header is not a JSON object")
    entries = parse_object(header, f"the header of {where}")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{where}: {_METADATA} must map names to strings")
    spans = sorted((_tensor(name, entry, where) for name, entry in entries.items()), key=lambda span: span[:2])
    return dict(_covered(spans, size - 8 - len(header), where))


def _header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    start = read_some(file, 8, path)
    where = shown_path(path)
    if _LFS.startswith(start) and start:
        raise InputError(f"{where} is a Git LFS pointer, not the weights; run `git lfs pull` where it is from")
    if len(start) < 8:
        raise InputError(f"{where} is too short for a safetensors file: {len(start)} bytes")
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT or length > size - 8:
        limit = min(HEADER_LIMIT, size - 8)
        raise InputError(
            f"{where} is truncated or not safetensors: it claims a header of {length} bytes, at most {limit} fit"
        )
    header = read_some(file, length, path)
    if len(header) < length:
        raise InputError(f"{where} is truncated: its header ends after {len(header)} of {length} bytes")
    return header


Span = tuple[int, int, StoredTensor]


def _tensor(name: str, entry: Any, where: str) -> Span:
    """One entry of a header: begin and end of its data, and what it is."""
    what = f"{where}: tensor {shown(name)}"
    if not name or len(name) > _MAX_NAME or not name.isprintable() or "{" in name:
        raise InputError(f"{what} has no usable name")
    if not isinstance(entry, dict):
        raise InputError(f"{what} must be described by an object, got {shown(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise InputError(f"{what} needs a dtype, got {shown(dtype)}")
    if dtype not in FORMATS:
        raise InputError(f"{what}: {unknown('dtype', dtype, FORMATS)}")
    sizes = _shape(shape, what)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise InputError(f"{what} needs data_offsets [begin, end], got {shown(offsets)}")
    begin, end = offsets
    bits = prod(sizes) * FORMATS[dtype].bits
    if end - begin != ceil_div(bits, 8) or bits % 8:
        raise InputError(
            f"{what} takes {ceil_div(bits, 8)} bytes as {dtype} {shape}, but its data_offsets span {end - begin}"
        )
    return begin, end, StoredTensor(name, sizes, FORMATS[dtype])


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ELEMENTS


def _shape(shape: Any, what: str) -> Shape:
    """The shape, or `InputError` for one that no tensor has."""
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_natural(n) for n in shape):
        raise InputError(f"{what}: shape must be a list of sizes that are not negative, got {shown(shape)}")
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_ELEMENTS:
            raise InputError(f"{what}: a shape of more than 2**63 elements cannot be")
    return tuple(shape)


def _covered(spans: list[Span], size: int, where: str) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors, when their data lie side by side and fill the file to its end."""
    at = 0
    for begin, end, tensor in spans:
        if begin != at:
            fault = "overlaps the one before it" if begin < at else f"leaves {begin - at} bytes unused before it"
            raise InputError(f"{where}: the data of tensor {shown(tensor.name)} {fault}")
        at = end
        yield tensor.name, tensor
    if at != size:
        fault = "truncated" if at > size else "corrupt"
        raise InputError(f"{where} is {fault}: its tensors take {at} bytes of data, it holds {size}")


def read_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards that a model.safetensors.index.json names, shard by shard. Raises `InputError`.

    Shards lie beside the index: a name with a folder in it is refused. Index and headers must agree.
    """
    where = shown_path(path)
    weight_map = read_object(path, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where} needs a weight_map of tensor names to file names, got {shown(weight_map)}")
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(weight_map, where):
        found = read_header(path.with_name(shard))
        for name in found:
            if weight_map.get(name) != shard:
                listed = shown(weight_map[name]) if name in weight_map else "nowhere"
                raise InputError(f"{where} lists tensor {shown(name)} {listed}, but it is in {shown(shard)}")
        tensors |= found
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(f"{where} lists tensor {shown(name)} in {shown(shard)}, but it is not there")
    return tensors


def _shards(weight_map: dict[str, Any], where: str) -> list[str]:
    shards = []
    for shard in dict.fromkeys(s if isinstance(s, str) else shown(s) for s in weight_map.values()):
        plain = shard.isprintable() and not set(shard) & set('/\\:"') and len(shard) <= 255
        if not plain or not shard.endswith(".safetensors"):
            raise InputError(f"{where} names the shard {shown(shard)}; a shard is a .safetensors file beside the index")
        shards.append(shard)
    return shards
