"""Two small-transformer language models and their training loops, in plain torch, that allocate what recorded runs did.

The recordings are of students' solutions of Stanford's CS336 (assignment 2), made with torch.cuda.memory. What is here
computes the same functions by the same operations in the same order, with the same tensors alive beside them, and is
otherwise written anew. Which run each recording is of is said in `recorded_cases.py`.

- `First`, of github.com/NiuHuangxiaozi/assignment2-systems: made on the card, but rotary tables and masks come from the
  host; the optimizer makes new moments and weights each time.
- `Second`, of github.com/LINYUNLinYun/CS336-assignment2-systems: made on the host and moved; torch's AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

aten = torch.ops.aten


Turn = Callable[[Tensor], Tensor]
Hide = Callable[[Tensor], tuple[Tensor, ...]]  # the mask, and what lives as long


class Sizes(NamedTuple):
    """Of a model."""

    width: int
    inner: int
    layers: int
    heads: int
    positions: int
    vocabulary: int = 10_000


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


class Matrix(nn.Module):
    """One that comes in its turn among a module's children."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = matrix(rows, columns)


def project(t: Tensor, weight: Tensor) -> Tensor:
    """A linear layer as an einsum, which torch computes as a batch of one product."""
    return torch.einsum("...i,oi->...o", t, weight)


def scores_of(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("...qd,...kd->...qk", queries, keys)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("...qk,...kd->...qd", weights, values)


def silu(t: Tensor) -> Tensor:
    return t * torch.sigmoid(t)


class Feed(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = matrix(sizes.inner, sizes.width)
        self.down = matrix(sizes.width, sizes.inner)
        self.up = matrix(sizes.inner, sizes.width)

    def forward(self, t: Tensor) -> Tensor:
        return project(silu(project(t, self.gate)) * project(t, self.up), self.down)


class Attention(nn.Module):
    """Causal self-attention; how positions and scores are treated is each model's own."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query = matrix(sizes.width, sizes.width)
        self.key = matrix(sizes.width, sizes.width)
        self.value = matrix(sizes.width, sizes.width)
        self.out = matrix(sizes.width, sizes.width)

    def forward(self, t: Tensor, rotate: Turn, mask: Hide) -> Tensor:
        q, k, v = project(t, self.query), project(t, self.key), project(t, self.value)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q = rotate(q)
        k = rotate(k)
        seen = mask(t)
        mixed = self.attend(q, k, v, seen[0])
        mixed = mixed.transpose(1, 2).flatten(-2)
        return project(mixed, self.out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        raise NotImplementedError


class Block(nn.Module):
    """Normalized input, attention, added; the same with the feed-forward part."""

    before_attention: nn.Module
    before_feed: nn.Module

    def __init__(self, sizes: Sizes, attention: type[Attention], norm: type[nn.Module], norms_first: bool) -> None:
        super().__init__()
        if norms_first:
            self.add_norms(norm, sizes.width)
        self.attention = attention(sizes)
        self.feed = Feed(sizes)
        if not norms_first:
            self.add_norms(norm, sizes.width)

    def add_norms(self, norm: type[nn.Module], width: int) -> None:
        self.before_attention = norm(width)
        self.before_feed = norm(width)

    def forward(self, t: Tensor, rotate: Turn, mask: Hide) -> Tensor:
        added = self.attention(self.before_attention(t), rotate, mask)
        middle = t + added
        fed = self.feed(self.before_feed(middle))
        return middle + fed


class Model(nn.Module):
    """An embedding, blocks, and a projection to the vocabulary."""

    def __init__(
        self, sizes: Sizes, attention: type[Attention], norm: type[nn.Module], *, norms_first: bool = False
    ) -> None:
        super().__init__()
        self.embedding = Matrix(sizes.vocabulary, sizes.width)
        self.sizes = sizes
        self.tables()
        self.blocks = nn.ModuleList(Block(sizes, attention, norm, norms_first) for _ in range(sizes.layers))
        self.last = norm(sizes.width)
        self.head = Matrix(sizes.vocabulary, sizes.width)

    def tables(self) -> None:
        """Makes what `rotate` needs."""
        raise NotImplementedError

    def rotate(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def mask(self, t: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding.weight[ids]
        t = embedded
        for block in self.blocks:
            t = block(t, self.rotate, self.mask)
        t = self.last(t)
        return project(t, self.head.weight)

    def angles(self) -> Tensor:
        """Of each position and pair of a head's elements."""
        pairs = self.sizes.width // self.sizes.heads // 2
        rates = 10_000.0 ** (-torch.arange(pairs, device="cpu") / pairs)
        return torch.outer(torch.arange(self.sizes.positions, device="cpu").float(), rates)


# -- the first --------------------------------------------------------------------------------------------


class FirstNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, t: Tensor) -> Tensor:
        given = t.dtype
        t = t.to(torch.float32)
        size = torch.sqrt(torch.mean(t**2, dim=-1, keepdim=True) + 1e-5)
        normalized = t / size * self.weight
        return normalized.to(given)


def first_softmax(t: Tensor) -> Tensor:
    """Both exponentials are computed; the places of the maxima live as long as they do."""
    highest, _places = torch.max(t, dim=-1, keepdim=True)
    return torch.exp(t - highest) / torch.sum(torch.exp(t - highest), dim=-1, keepdim=True)


class FirstAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        seen = seen.to(q.device)
        scores = scores_of(q, k)
        scaled = scores / torch.sqrt(torch.tensor(q.shape[-1], device=scores.device))
        scaled = scaled.masked_fill_(~seen.bool(), -math.inf)
        weights = first_softmax(scaled)
        return weighted(weights, v)


class First(Model):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, FirstAttention, FirstNorm, norms_first=True)

    def tables(self) -> None:
        """On the host, where they stay."""
        self.sine, self.cosine = self.angles().sin(), self.angles().cos()

    def rotate(self, t: Tensor) -> Tensor:
        places = torch.arange(t.shape[-2], device="cpu")
        sine = self.sine[places].to(t.device).unsqueeze(-1)
        cosine = self.cosine[places].to(t.device).unsqueeze(-1)
        t = t.unflatten(-1, (-1, 2))
        even = cosine * t[..., :1] - sine * t[..., 1:]
        odd = sine * t[..., :1] + cosine * t[..., 1:]
        turned = torch.cat([even, odd], dim=-1)
        return turned.flatten(-2)

    def mask(self, t: Tensor) -> tuple[Tensor, ...]:
        return (torch.tril(torch.ones(t.shape[-2], t.shape[-2], device="cpu")),)


def first_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a target of zeros and ones."""
    rows = logits.shape[0]
    highest, _places = torch.max(logits, dim=-1, keepdim=True)
    logs = logits - highest - torch.log(torch.sum(torch.exp(logits - highest), dim=-1, keepdim=True))
    chosen = torch.zeros_like(logs)
    chosen.scatter_(-1, targets.unsqueeze(-1), 1)
    return -torch.sum(chosen * logs) / rows


class FirstAdam(torch.optim.Optimizer):
    """Adam whose moments and weights are new tensors after each step; the moments are there from the start."""

    def __init__(self, parameters: Any, lr: float = 1e-3, beta: float = 0.9, gamma: float = 0.999) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "gamma": gamma, "decay": 0.0})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"first": torch.zeros_like(p.data), "second": torch.zeros_like(p.data), "steps": 0}

    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        beta, gamma = group["beta"], group["gamma"]
        for p in group["params"]:
            state = self.state[p]
            steps = state["steps"] + 1
            rate = group["lr"] * math.sqrt(1 - gamma**steps) / (1 - beta**steps)
            grad = p.grad.data
            before = state["first"]
            first = beta * before + (1 - beta) * grad
            state["first"] = first
            before_second = state["second"]
            second = gamma * before_second + (1 - gamma) * grad**2
            state["second"] = second
            state["steps"] = steps
            p.data = p.data - rate * (first / (torch.sqrt(second) + 1e-8))
            p.data = p.data - group["lr"] * group["decay"] * p.data


def last_rows(t: Tensor) -> Tensor:
    """`t[:, -1, :]` as torch 2.6 has it, for which a slice of everything is an operation. (2.13 leaves it out.)"""
    all_of = 2**63 - 1
    return aten.slice.Tensor(aten.slice.Tensor(t, 0, 0, all_of).select(1, -1), 1, 0, all_of)  # type: ignore[no-any-return]  # an operation, which returns a tensor


# -- the second -------------------------------------------------------------------------------------------


class SecondNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, t: Tensor) -> Tensor:
        given = t.dtype
        t = t.to(torch.float32)
        rate = torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-5)
        t = t * rate
        return (self.weight * t).to(given)


def second_softmax(t: Tensor) -> Tensor:
    lowered = t - torch.max(t, dim=-1, keepdim=True)[0]
    powers = torch.exp(lowered)
    return powers / torch.sum(powers, dim=-1, keepdim=True)


class SecondAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = scores_of(q, k) / math.sqrt(k.shape[-1])
        scores = torch.where(seen, scores, -math.inf)
        weights = second_softmax(scores)
        return weighted(weights, v)


class Second(Model):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, SecondAttention, SecondNorm)

    def tables(self) -> None:
        table = torch.stack((self.angles().cos(), self.angles().sin()))
        self.register_buffer("table", table.to(self.embedding.weight.device), persistent=False)

    def rotate(self, t: Tensor) -> Tensor:
        first, second = t.unflatten(-1, (-1, 2)).movedim(-1, 0).unbind(0)
        cosine, sine = self.table[:, : t.size(-2)].unbind(0)
        turned = cosine * first - sine * second
        other = sine * first + cosine * second
        return torch.cat((turned, other), dim=-1)

    def mask(self, t: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(t.shape[-2], device=t.device)
        return places.unsqueeze(-1) >= places, places


def second_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1))
