"""Adam-mini as published packages run it (see `adam_mini.py` for the method and for ours).

Both decide by substrings of a parameter's name; the tables below are theirs.
"""

from __future__ import annotations

from galore_mem.dtypes import FLOAT32
from galore_mem.errors import InputError
from galore_mem.memory.tape import Shape, Tensor
from galore_mem.methods.base import Buffer, Implementation, Job, Slot, Slots, Trained
from galore_mem.methods.eager import add_float32, as_float32, mean
from galore_mem.spec.model import Heads

# adam-mini 1.1.1: the first rule with a word that the lower-cased name contains
_RULES = (
    ("adam", ("bias",)),
    ("head", ("k_proj", "q_proj", "wq", "wk", "query", "key")),
    ("row", ("embed", "embd", "wte", "lm_head", "output", "final_layer", "v_proj", "wv", "value",
             "feed_forward", "linear", "mlp", "o_proj", "wo", "attn.proj")),
)  # fmt: skip
# pytorch_optimizer 4.1.0: likewise, with case
_OLDER_RULES = (
    ("adam", ("embed", "embd", "wte", "lm_head.weight", "output.weight")),
    ("head", ("k_proj.weight", "q_proj.weight", "wq.weight", "wk.weight")),
    ("group", ("attn.attn.weight", "attn.qkv.weight")),
)


def _rule(name: str, rules: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    for rule, words in rules:
        if any(word in name for word in words):
            return rule
    return "whole"


def _heads(p: Trained, job: Job) -> Heads:
    if job.heads is None:
        raise InputError(f"adam-mini partitions {p.name} by head, and this model has no config to take heads from")
    return job.heads


def _by_head(p: Trained, job: Job) -> Shape:
    """Both packages take a head to be hidden_size^2 / num_attention_heads elements."""
    heads = _heads(p, job)
    per_head = heads.hidden_size * heads.hidden_size // heads.num_attention_heads
    if p.numel % per_head:
        raise InputError(
            f"this adam-mini cannot view {p.name} {p.shape} in heads of {per_head} elements "
            f"(hidden_size^2 / num_attention_heads); use the galore-mem implementation"
        )
    return p.numel // per_head, per_head


# -- adam-mini 1.1.1 -------------------------------------------------------------------------------


def _official(p: Trained, job: Job) -> tuple[Shape, Shape]:
    """Shapes of m and of the second moment."""
    rule = _rule(p.name.lower(), _RULES)
    if rule == "adam":
        return p.shape, p.shape
    if rule == "head":
        by_head = _by_head(p, job)
        return by_head, (by_head[0], 1)
    if rule == "row":
        if len(p.shape) != 2:
            raise InputError(
                f"adam-mini 1.1.1 takes {p.name} for a matrix, and its shape is {p.shape}; "
                "use the galore-mem implementation"
            )
        return p.shape, (p.shape[0], 1)
    return p.shape, ()


def state_official(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`m` (query and key: as heads x elements) and `vmean` (a bias: `v`), in the parameter's format."""
    first, second = _official(p, job)
    name = "v" if _rule(p.name.lower(), _RULES) == "adam" else "vmean"
    return Buffer("m", first, p.dtype), Buffer(name, second, p.dtype)


def step_official(slots: Slots, job: Job, refresh: bool) -> None:
    """Adam_mini.step. Names outlive the iteration: the previous parameter's `tmp_lr`, `h`, `stepsize` and
    `update` are there until the next ones take their names."""
    tmp_lr: Tensor | None = None
    h: Tensor | None = None
    stepsize: Tensor | None = None
    update: Tensor | None = None
    for slot in slots:
        dtype = slot.param.dtype
        first, second = _official(slot.param, job)
        if _rule(slot.param.name.lower(), _RULES) == "adam":
            h = slot.new(second, dtype, slot.new(second, dtype))  # (v.sqrt() / c).add_(eps)
            stepsize = None  # a float
            continue
        if second:
            tmp_lr = _mean_of_square(slot, job, first)
        else:
            tmp_lr = slot.new(second, dtype, slot.like())  # sum(grad * grad)
            tmp_lr = slot.new(second, dtype)
        h = slot.new(second, dtype, slot.new(second, dtype))
        stepsize = slot.new(second, dtype, slot.new(second, dtype))  # (1 / c) / h: reciprocal, times
        update = slot.new(first, dtype)
        slot.new(first, dtype)  # -update
    del tmp_lr, h, stepsize, update


def _mean_of_square(slot: Slot, job: Job, shape: Shape) -> Tensor:
    """`torch.mean(grad * grad, dim=1, keepdim=True)`, the product alive until the mean is there."""
    square = slot.like()
    result = mean(slot, job, shape, slot.param.dtype, 1, keep=True)
    del square
    return result


OFFICIAL = Implementation(
    name="adam-mini", version="adam-mini 1.1.1", source="adam_mini/adam_mini.py:Adam_mini",
    state=state_official, step=step_official,
    equations={"other": "m·n + rows (query, key: one per hidden_size^2/num_attention_heads; bias: 2·n; else + 1)"},
)  # fmt: skip


# -- pytorch_optimizer 4.1.0 -----------------------------------------------------------------------


def _older(p: Trained, job: Job) -> tuple[Shape, Shape]:
    """Shapes of m and of the second moment."""
    rule = _rule(p.name, _OLDER_RULES)
    if rule == "adam":
        return p.shape, p.shape
    if rule == "head":
        by_head = _by_head(p, job)
        return by_head, by_head[:1]
    if rule == "group":
        heads = _heads(p, job)
        groups = heads.num_key_value_heads
        parts = heads.num_attention_heads // groups + 2
        if p.numel % (groups * parts):
            raise InputError(f"pytorch_optimizer's AdamMini cannot view {p.name} {p.shape} as {groups} x {parts}")
        return (groups, parts, p.numel // (groups * parts)), (groups, parts)
    return p.shape, ()


def state_older(p: Trained, job: Job) -> tuple[Buffer, ...]:
    """`m` and `v` or `v_mean` in float32; `dimension`, a float32 scalar, where one value serves the whole."""
    rule = _rule(p.name, _OLDER_RULES)
    first, second = _older(p, job)
    extra = (Buffer("dimension", (), FLOAT32),) if rule == "whole" else ()
    return Buffer("m", first, FLOAT32), Buffer("v" if rule == "adam" else "v_mean", second, FLOAT32), *extra


def step_older(slots: Slots, job: Job, refresh: bool) -> None:
    """AdamMini.step: a float32 gradient per parameter. On CUDA the parameters with a single value are
    kept, with those gradients, for one update of all of them at the end."""
    grad: Tensor | None = None
    grads: list[Tensor | None] = []
    for slot in slots:
        grad = as_float32(slot, slot.grad)
        if _batched(slot, job):
            grads.append(grad)
        else:
            _update_older(slot, job)
    for slot in slots:
        if _batched(slot, job):
            slot.new(slot.param.shape, FLOAT32)  # grad.square(), summed
    updates = [slot.new(slot.param.shape, FLOAT32) for slot in slots if _batched(slot, job)]
    del grad, grads, updates


def _batched(slot: Slot, job: Job) -> bool:
    return job.device != "cpu" and _rule(slot.param.name, _OLDER_RULES) == "whole"


def _update_older(slot: Slot, job: Job) -> None:
    first, second = _older(slot.param, job)
    rule = _rule(slot.param.name, _OLDER_RULES)
    if rule != "adam":
        slot.new(first, FLOAT32)  # grad * grad, reduced
    h = slot.new(second, FLOAT32)
    if rule != "adam":
        update = slot.new(first, FLOAT32)
        add_float32(slot, job)
        del update
    elif job.device == "cpu" and slot.param.dtype is not FLOAT32:
        quotient = slot.new(first, FLOAT32)  # m / h: the CPU has no addcdiv_ of mixed formats
        add_float32(slot, job)
        del quotient
    del h


PYTORCH_OPTIMIZER = Implementation(
    name="pytorch-optimizer", version="pytorch_optimizer 4.1.0", source="pytorch_optimizer/optimizer/adam_mini.py",
    one_by_one=False,
    state=state_older, step=step_older, layerwise=False,
    equations={"other": "m·n at 4 bytes (+ m·n for embedding and head; query, key: + heads; else + 1)"},
    notes=(
        "on CUDA, float32 gradients and updates of all parameters but embedding, head, query and key are alive at once",
        "takes a model, not parameters: no layer-wise update",
    ),
)  # fmt: skip
