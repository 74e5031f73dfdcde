"""The papers' algorithms once more: slowly, literally, in float64, for one parameter at a time.

These are what the optimizers of `galore_mem.optim` are compared with, so nothing here is taken from them: every line
follows a line of a paper, blocks and rows are Python loops, nothing is done in place of something else to save memory
or time. Only the names and the layout of `buffers()` are the optimizers', so that states can be compared one by one.
Where a paper is open, the docstring of the optimizer's module states the choice, and the same choice is made here.

A step has two parts: `look` at the gradient (projectors and moments), and `move` the weight. Tests in half precision
compare each part by itself, from the optimizer's own state, because a rounded moment can turn an element's sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Blocks = Sequence[Sequence[int]]  # each block: the rows that share a second moment
Spaces = tuple[Tensor, Tensor]  # orthonormal columns: rows x r from the left, cols x r from the right


class Literal:
    """A weight, its buffers and its settings. `lr` may be changed between steps, as a scheduler does."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weight = weight.detach().to(torch.float64).clone()
        self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t = 0  # steps taken

    def step(self, grad: Tensor) -> None:
        self.look(grad)
        self.move()

    def look(self, grad: Tensor) -> None:
        """Everything of a step up to the weight."""
        self.t += 1
        self.moments(grad.to(torch.float64))

    def move(self) -> None:
        """Decoupled weight decay first (Loshchilov, Hutter, arXiv:1711.05101, as in torch), then the update."""
        self.weight = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = self.weight - self.lr * self.direction()

    def moments(self, grad: Tensor) -> None:
        raise NotImplementedError

    def direction(self) -> Tensor:
        raise NotImplementedError

    def buffers(self) -> dict[str, Any]:
        raise NotImplementedError

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        """Goes on from an optimizer's state and weight."""
        raise NotImplementedError


class AdamW(Literal):
    """Kingma, Ba, arXiv:1412.6980, algorithm 1, with the weight decay of arXiv:1711.05101, algorithm 2."""

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self.m = torch.zeros_like(self.weight)
        self.v = torch.zeros_like(self.weight)

    def moments(self, grad: Tensor) -> None:
        self.m = self.beta1 * self.m + (1 - self.beta1) * grad
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad * grad

    def direction(self) -> Tensor:
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return m_hat / (v_hat.sqrt() + self.eps)

    def buffers(self) -> dict[str, Any]:
        return {"exp_avg": self.m, "exp_avg_sq": self.v, "step": self.t}

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        self.weight = weight.to(torch.float64).clone()
        if state:
            self.m, self.v, self.t = state["exp_avg"].double(), state["exp_avg_sq"].double(), state["step"]


# -- Adam-mini ---------------------------------------------------------------------------------------


class AdamMini(Literal):
    """Adam-mini, arXiv:2406.16793, algorithm 1: for each block b, v_b = (1 - β2)·mean(g_b∘g_b) + β2·v_b.

    `blocks` lists rows; rows are the first dimension (all but the last where there are more than two), the elements of
    a vector, or the columns of a matrix stored in x out (`transposed`).
    """

    def __init__(self, weight: Tensor, blocks: Blocks, *, transposed: bool = False, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self.blocks, self.transposed = blocks, transposed
        self.m = torch.zeros_like(self.weight)
        self.v = [0.0] * len(blocks)

    def rows(self, t: Tensor) -> Tensor:
        """A matrix of one row per output, from a tensor in the weight's layout."""
        if self.transposed:
            return t.T
        return t.reshape(-1, 1) if t.dim() == 1 else t.reshape(-1, t.shape[-1])

    def moments(self, grad: Tensor) -> None:
        self.m = self.beta1 * self.m + (1 - self.beta1) * grad
        self.second_moments(self.rows(grad), self.blocks)

    def second_moments(self, rows: Tensor, blocks: Blocks) -> None:
        """The mean over all values of all rows of a block."""
        for b, block in enumerate(blocks):
            squares = [float(value) ** 2 for i in block for value in rows[i]]
            self.v[b] = self.beta2 * self.v[b] + (1 - self.beta2) * math.fsum(squares) / len(squares)

    def v_hat(self) -> list[float]:
        return [v / (1 - self.beta2**self.t) for v in self.v]

    def direction(self) -> Tensor:
        m_hat = self.rows(self.m / (1 - self.beta1**self.t)).clone()
        for v_hat, block in zip(self.v_hat(), self.blocks, strict=True):
            for i in block:
                m_hat[i] = m_hat[i] / (math.sqrt(v_hat) + self.eps)
        return m_hat.T if self.transposed else m_hat.reshape(self.weight.shape)

    def buffers(self) -> dict[str, Any]:
        return {"exp_avg": self.m, "exp_avg_sq": self.column(), "step": self.t}

    def column(self) -> Tensor:
        column = torch.tensor(self.v, dtype=torch.float64).reshape(-1, 1)
        return column.T if self.transposed else column

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        self.weight = weight.to(torch.float64).clone()
        if state:
            self.m, self.v, self.t = state["exp_avg"].double(), state["exp_avg_sq"].flatten().tolist(), state["step"]


# -- GaLore ------------------------------------------------------------------------------------------


def exact(grad: Tensor, rank: int) -> Spaces:
    """Leading singular vectors (GaLore, definition 3.4); of half-precision gradients in float32, then in their format.

    The decomposition is LAPACK's in the gradient's precision, the optimizer's too: the signs of singular vectors are
    arbitrary, and where moments are not carried over to a new projector they decide what the old numbers mean.
    """
    u, _, vt = torch.linalg.svd(grad if grad.dtype == torch.float64 else grad.float(), full_matrices=False)
    left, right = u[:, :rank], vt[:rank].T
    return left.to(grad.dtype).double(), right.to(grad.dtype).double()


def sides(rows: int, cols: int, proj_type: str) -> tuple[bool, bool]:
    """Is it projected from the left, from the right? `std`: section 4 of GaLore projects the shorter side, from the
    left where rows < cols; a square one from the right, as the reference does."""
    wide = rows < cols
    return {
        "std": (wide, not wide),
        "reverse_std": (not wide, wide),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


class Projector:
    """P (and Q) of a matrix: when they are renewed (GaLore, algorithm 2, line 'if t mod T = 0'), and what they do.

    With `cos_threshold` the gap adapts (Q-GaLore, arXiv:2407.08296, section 3.2): when the similarity to the projector
    before was at least the threshold in each of the last `queue_size` refreshes, the gap grows `gamma_proj` times.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        *,
        update_proj_gap: int = 200,
        proj_type: str = "std",
        carry_moments: bool = False,
        cos_threshold: float | None = None,
        gamma_proj: float = 2.0,
        queue_size: int = 5,
        decompose: Callable[[Tensor, int], Spaces] = exact,
    ) -> None:
        rows, cols = shape
        self.rank = min(rank, rows, cols)
        self.from_left, self.from_right = sides(rows, cols, proj_type)
        self.gap, self.carry, self.decompose = update_proj_gap, carry_moments, decompose
        self.threshold, self.gamma, self.queue_size = cos_threshold, gamma_proj, queue_size
        self.next, self.refreshes, self.similarities = 0, 0, list[float]()
        self.p: Tensor | None = None
        self.q: Tensor | None = None

    def low_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.rank if self.from_left else shape[0], self.rank if self.from_right else shape[1]

    def down(self, grad: Tensor) -> Tensor:
        """R = Pᵀ·G, G·Q or Pᵀ·G·Q."""
        low = self.p.T @ grad if self.p is not None else grad
        return low @ self.q if self.q is not None else low

    def up(self, low: Tensor) -> Tensor:
        """P·N, N·Qᵀ or P·N·Qᵀ."""
        full = self.p @ low if self.p is not None else low
        return full @ self.q.T if self.q is not None else full

    def renew(self, grad: Tensor, t: int) -> tuple[Tensor | None, Tensor | None] | None:
        """A new projector where it is due before step `t` (from 0). Returns the maps from the old coordinates to the
        new ones, new.T·old of each side, where moments are to be carried over."""
        if t != self.next:
            return None
        old = self.p, self.q
        p, q = self.decompose(grad, self.rank)
        self.p, self.q = p if self.from_left else None, q if self.from_right else None
        first = self.refreshes == 0
        self.refreshes += 1
        if not first and self.threshold is not None:
            self.adapt(old)
        self.next = t + self.gap
        if first or not self.carry:
            return None
        left, right = (
            new.T @ before if new is not None and before is not None else None
            for new, before in zip((self.p, self.q), old, strict=True)
        )
        return left, right

    def adapt(self, old: tuple[Tensor | None, Tensor | None]) -> None:
        cosines = []
        for new, before in zip((self.p, self.q), old, strict=True):
            if new is not None and before is not None:
                for k in range(self.rank):
                    a, b = new[:, k], before[:, k]
                    cosines.append(abs(float(a @ b)) / (float(a.norm()) * float(b.norm())))
        self.similarities = [*self.similarities, sum(cosines) / len(cosines)][-self.queue_size :]
        assert self.threshold is not None
        if len(self.similarities) == self.queue_size and min(self.similarities) >= self.threshold:
            self.gap = math.floor(self.gap * self.gamma)
            self.similarities = []  # the next k refreshes are counted anew

    def buffers(self) -> dict[str, Any]:
        if self.p is not None and self.q is not None:
            return {"projector_left": self.p, "projector_right": self.q.T, "next_refresh": self.next}
        only = self.p if self.p is not None else self.q.T  # type: ignore[union-attr]  # one of both is there
        return {"projector": only, "next_refresh": self.next}

    def take(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        left = state.get("projector_left", state.get("projector"))
        right = state.get("projector_right", state.get("projector"))
        self.p = left.double() if self.from_left else None
        self.q = right.double().T if self.from_right else None


def carried(moment: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    moment = left @ moment if left is not None else moment
    return moment @ right.T if right is not None else moment


def squared(maps: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Second moments mix by squared entries: E[(Σ a_i x_i)²] = Σ a_i² E[x_i²] for uncorrelated x_i."""
    left, right = (None if a is None else a * a for a in maps)
    return left, right


class GaLore(AdamW):
    """GaLore, arXiv:2403.03507, algorithm 2: the moments are those of R = Pᵀ·G, W changes by α·P·N."""

    def __init__(self, weight: Tensor, rank: int, *, scale: float = 0.25, low: dict[str, Any], **settings: Any) -> None:
        super().__init__(weight, **settings)
        self.projector, self.scale = Projector(weight.shape, rank, **low), scale
        self.m = torch.zeros(self.projector.low_shape(weight.shape), dtype=torch.float64)
        self.v = torch.zeros_like(self.m)

    def look(self, grad: Tensor) -> None:
        maps = self.projector.renew(grad, self.t)
        if maps is not None:
            self.m, self.v = carried(self.m, *maps), carried(self.v, *squared(maps))
        super().look(grad)

    def moments(self, grad: Tensor) -> None:
        super().moments(self.projector.down(grad))

    def direction(self) -> Tensor:
        return self.scale * self.projector.up(super().direction())

    def buffers(self) -> dict[str, Any]:
        return {**super().buffers(), **self.projector.buffers()}

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        super().take(state, weight)
        self.projector.take(state)


# -- GaLore-mini -------------------------------------------------------------------------------------


class GaLoreMini(AdamMini):
    """GaLore-mini, section 3.1 and algorithm 1, with the choices of `galore_mem/optim/galore_mini.py`.

    Step 2 of section 3.1 is `second_moments`, 3 and 4 are the projector's, 5 is `moments`, 6 `direction`, 7 `move`.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        blocks: Blocks,
        *,
        approach: int = 3,
        scale: float = 0.25,
        low: dict[str, Any],
        **settings: Any,
    ) -> None:
        self.approach, self.scale = approach, scale
        self.projector = Projector(weight.shape, rank, **low)
        low_shape = self.projector.low_shape(weight.shape)
        transposed = bool(settings.get("transposed", False))
        if approach == 1:  # the rows of the low-rank gradient, each by itself
            blocks = [[i] for i in range(low_shape[1] if transposed else low_shape[0])]
        super().__init__(weight, blocks, **settings)
        self.m = torch.zeros(low_shape, dtype=torch.float64)

    def look(self, grad: Tensor) -> None:
        maps = self.projector.renew(grad, self.t)
        if maps is not None:
            self.m = carried(self.m, *maps)
            through = maps[1] if self.transposed else maps[0]
            if self.approach == 1 and through is not None:  # only then are second moments in the low-rank coordinates
                self.v = ((through * through) @ torch.tensor(self.v, dtype=torch.float64)).tolist()
        super().look(grad)

    def moments(self, grad: Tensor) -> None:
        low = self.projector.down(grad)
        self.m = self.beta1 * self.m + (1 - self.beta1) * low
        self.second_moments(self.rows(low if self.approach == 1 else grad), self.blocks)

    def direction(self) -> Tensor:
        m_hat = self.m / (1 - self.beta1**self.t)
        if self.approach == 3:
            return self.scale * self.divided(self.projector.up(m_hat), self.each_row())
        if self.approach == 2:
            return self.scale * self.projector.up(self.divided(m_hat, self.each_low_row()))
        return self.scale * self.projector.up(self.divided(m_hat, self.v_hat()))

    def divided(self, t: Tensor, v_hat: Sequence[float]) -> Tensor:
        rows = self.rows(t).clone()
        assert len(rows) == len(v_hat)
        for i, v in enumerate(v_hat):
            rows[i] = rows[i] / (math.sqrt(v) + self.eps)
        return rows.T if self.transposed else rows

    def each_row(self) -> list[float]:
        """The second moment of each row of the weight: its block's."""
        of_row = {i: v for v, block in zip(self.v_hat(), self.blocks, strict=True) for i in block}
        return [of_row[i] for i in range(len(of_row))]

    def each_low_row(self) -> list[float]:
        """Approach 2: low-rank row k is Σ_i P[i, k]·row i, and its second moment Σ_i P[i, k]²·v_i."""
        through = self.projector.q if self.transposed else self.projector.p
        if through is None:  # rows are as they were
            return self.each_row()
        v = self.each_row()
        return [math.fsum(float(through[i, k]) ** 2 * v[i] for i in range(len(v))) for k in range(self.projector.rank)]

    def buffers(self) -> dict[str, Any]:
        return {**super().buffers(), **self.projector.buffers()}

    def take(self, state: Mapping[str, Any], weight: Tensor) -> None:
        super().take(state, weight)
        self.projector.take(state)
