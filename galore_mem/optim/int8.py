"""INT8 weights that are trained, Q-GaLore's (arXiv:2407.08296, section 3.4); `int8_linear.py` has the layers.

A weight takes one byte per element, and a scale and a zero point per 256 elements in the format that the layer computes
in (`quantize.py`). Its gradient is an ordinary full one, in `weight.grad`.

An update is rounded stochastically: a value between two codes goes to the upper one with the probability of its
distance from the lower one, so that its expectation is exact and updates far below a scale are not lost.

The paper's code refits each group's range to its values in every step, and so rounds again what no gradient has
changed. Ours adds the update to the codes, which leaves them bit for bit where it is zero, and refits a group only when
a value leaves its range, or when the values fill less than half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from galore_mem.errors import InputError
from galore_mem.methods.q_galore import block_rows
from galore_mem.methods.q_galore_torch import GROUP, groups
from galore_mem.optim.quantize import INT8, Grid, dequantize_, grouped, least_scale, ranges

# codes at either end that a refitted group leaves free: values that grow a little do not make it refit again
SPARE = 2
FEWEST = INT8 // 2  # codes between a group's least and largest value (or zero), below which it is refitted

aten = torch.ops.aten


# -- the grid of a weight --------------------------------------------------------------------------


def covering(low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid:
    """The grid of groups with values from `low` <= 0 to `high` >= 0: its ends lie outside, `SPARE` codes away, also
    after its scales are rounded to their format. Rounding is unbiased only if no value is beyond the ends."""
    limits = torch.finfo(dtype)
    scales = (high - low).div_(INT8 - 1 - 2 * SPARE).mul_(1 + limits.eps).add_(limits.tiny * limits.eps)
    scales = scales.clamp_(min=least_scale(dtype)).to(dtype)
    return Grid(scales, low.div(scales).neg_().ceil_().add_(SPARE).to(dtype))


def refit_(values: Tensor, grid: Grid) -> None:
    """Fits the groups whose values have left the codes' range, or fill too little of it. `values`: flat, in codes of
    the grid; they and the grid are changed in place, what they stand for is not."""
    scales, zeros = (t.to(values.dtype) for t in grid)
    low, high = ranges(values, zeros)
    # counted between whole codes, so that rounding cannot make a group refit that stayed
    stays = (low >= 0) & (high <= INT8) & (high.floor() - low.ceil() >= FEWEST)
    fresh = covering((low - zeros).mul_(scales), (high - zeros).mul_(scales), grid.scales.dtype)
    new = [torch.where(stays, old, t.to(old.dtype)) for old, t in zip((scales, zeros), fresh, strict=True)]
    for part, zero, ratio, new_zero in grouped(values, zeros, scales / new[0], new[1]):
        part.sub_(zero).mul_(ratio).add_(new_zero)
    for old, t in zip(grid, new, strict=True):
        old.copy_(t)
    values.clamp_(0, INT8)


def changed(codes: Tensor, grid: Grid, delta: Tensor, alpha: float, keep: float) -> Tensor:
    """`keep · weight + alpha · delta` in codes of the grid (flat, float32 at least): exactly the codes where that
    changes nothing."""
    values = codes.to(torch.promote_types(grid.scales.dtype, torch.float32)).view(-1)
    if keep != 1:
        for part, zero in grouped(values, grid.zeros):
            part.sub_(zero).mul_(keep).add_(zero)
    for (part, scale), (change,) in zip(grouped(values, grid.scales), grouped(delta.view(-1)), strict=True):
        part.addcdiv_(change, scale, value=alpha)
    return values


def round_(codes: Tensor, values: Tensor, grid: Grid, generator: torch.Generator) -> None:
    """Writes values in codes of the grid, rounded stochastically, after refitting the grid where that is needed. The
    values are lost. (`floor(values + noise)` would round some whole numbers up: their sum has too few bits.)"""
    refit_(values, grid)
    codes.copy_(values)  # the whole part
    noise = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
    codes.add_((noise < values.frac_()).view(torch.uint8))


# -- the tensor ------------------------------------------------------------------------------------


class Int8Weight(Tensor):
    """A matrix of codes that stands for a float one: its shape, `dtype`, device and gradient are those of the float
    matrix; `codes` (uint8, its shape), `scales` and `zeros` (groups x 1, its dtype) are what exists.

    Operations that only read get the float matrix, which is built for them. Writing is for `copy_`, which rounds to the
    nearest code, and `add_rounded_`; any other is an `InputError`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to say: none

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, zeros: Tensor) -> Int8Weight:
        shape = groups(codes.numel())
        if codes.dtype is not torch.uint8 or codes.dim() != 2 or not codes.is_contiguous():
            raise InputError(f"codes must be a contiguous uint8 matrix, got {codes.dtype}, {tuple(codes.shape)}")
        for name, t in (("scales", scales), ("zeros", zeros)):
            if tuple(t.shape) != shape or t.dtype is not scales.dtype or not t.is_floating_point():
                raise InputError(f"{name} must be {shape} in a float format, got {t.dtype}, {tuple(t.shape)}")
        made: Int8Weight = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scales.dtype, device=codes.device
        )
        made.codes, made.scales, made.zeros = codes, scales, zeros
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """The nearest codes of a float matrix."""
        if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
            raise InputError(f"INT8 weights stand for float matrices, got {weight.dtype}, {tuple(weight.shape)}")
        count = groups(weight.numel())
        made = cls(
            torch.empty(weight.shape, dtype=torch.uint8, device=weight.device),
            torch.empty(count, dtype=weight.dtype, device=weight.device),
            torch.empty(count, dtype=weight.dtype, device=weight.device),
        )
        made._assign(weight.detach())
        return made

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float matrix."""
        dtype = dtype or self.dtype
        return dequantize_(self.codes.to(dtype), Grid(self.scales, self.zeros).to(dtype))

    def blocks(self) -> Iterator[tuple[slice, Tensor, Grid]]:
        """Blocks of whole rows, which begin where a group does: rows, their codes, their grid (views)."""
        rows, cols = self.shape
        step = block_rows(rows, cols)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            of = slice(part.start * cols // GROUP, -(-part.stop * cols // GROUP))
            yield part, self.codes[part], Grid(self.scales[of], self.zeros[of])

    def _assign(self, weight: Tensor) -> None:
        """Takes the values of a float matrix of its shape."""
        for rows, codes, grid in self.blocks():
            wide = torch.promote_types(self.dtype, torch.float32)
            values = weight[rows].to(wide, copy=True, memory_format=torch.contiguous_format).view(-1)
            fresh = covering(*ranges(values, values.new_zeros(())), self.dtype)
            for old, new in zip(grid, fresh, strict=True):
                old.copy_(new)
            for part, scale, zero in grouped(values, *grid):
                part.div_(scale).add_(zero).round_().clamp_(0, INT8)
            codes.view(-1).copy_(values)

    def add_rounded_(
        self, delta: Callable[[slice], Tensor], *, alpha: float, keep: float, generator: torch.Generator
    ) -> None:
        """`weight = keep · weight + alpha · delta`, rounded stochastically. `delta(rows)` gives some of its rows, in
        their own storage."""
        for rows, codes, grid in self.blocks():
            round_(codes.view(-1), changed(codes, grid, delta(rows), alpha, keep), grid, generator)

    def become_(self, other: Int8Weight) -> None:
        """Takes the tensors of another weight for its own; it stays the same parameter, with its hooks."""
        self.data = other
        self.codes, self.scales, self.zeros = other.stored

    def share_memory_(self) -> Int8Weight:
        """As torch's, which looks for a storage that this tensor has not."""
        for t in self.stored:
            t.share_memory_()
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # torch's takes the same, untyped
        return f"Int8Weight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales", "zeros"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, shape: object, strides: object) -> Int8Weight:
        return Int8Weight(inner["codes"], inner["scales"], inner["zeros"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is untyped
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return cls(*args[0].stored)
        if func is aten.clone.default:
            return cls(*(t.clone() for t in args[0].stored))
        if func is aten._to_copy.default and (kwargs.get("dtype") or args[0].dtype).is_floating_point:
            where = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking")}
            told = {**where, "dtype": kwargs.get("dtype") or args[0].dtype}
            codes, *grid = args[0].stored
            return cls(codes.to(**where, copy=True), *(t.to(**told, copy=True) for t in grid))
        if func is aten.copy_.default and isinstance(args[0], Int8Weight):
            return args[0]._copy(args[1])
        if any(isinstance(t, Int8Weight) for t in tree_leaves(_written(func, args, kwargs))):
            raise InputError(
                f"{func} writes to an INT8 weight; only QGaLoreAdamW8bit updates these (another optimizer, or an "
                "initialization, needs the float layer)"
            )
        args, kwargs = tree_map_only(Int8Weight, Int8Weight.dequantized, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.zeros

    def _copy(self, other: Tensor) -> Int8Weight:
        if isinstance(other, Int8Weight):
            for mine, its in zip(self.stored, other.stored, strict=True):
                mine.copy_(its)
        else:
            self._assign(other.expand(self.shape))
        torch.autograd.graph.increment_version(self.stored)  # else uncounted here: a backward pass must notice
        return self


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [given[name] for name in written if name in given]
