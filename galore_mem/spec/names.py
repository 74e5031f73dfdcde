"""What tensor names tell when there is no config: order, roles, buffers, and the layers that repeat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby

from galore_mem.spec.model import Block, ParamSpec, Role, Shape

# A role by the words in a module's dotted path: the first line that matches. Head words count outside the layers
# only, where `output` is not a layer's own. The words are those of transformers, timm, Megatron and the first LLaMA.
_ROLE_WORDS = (
    (Role.NORM, r"norm|(^|[._])ln($|[._\d])"),
    (Role.HEAD, r"(^|\.)(lm_head|output|classifier|score|embed_out|qa_outputs|cls|pooler|head)($|\.)"),
    (Role.EMBEDDING, r"embed|(^|\.)(wte|wpe|emb)($|\.)"),
    (Role.ATTENTION, r"attn|attention|query_key|(^|[._])(q|k|v|o|qkv|kv|query|key|value|out)(_proj)?($|\.)"),
    (Role.MLP, r"mlp|ffn|ffw|feed_forward|expert|intermediate|(up|gate|down)_proj|_4?h_to_4?h"),
    (Role.MLP, r"(^|\.)(fc|fc\d|w\d|wi|wi_\d|wo|c_fc)($|\.)"),
    (Role.MLP, r"(^|\.)output($|\.)"),  # in a layer: the second matrix of BERT's MLP
)
_ROLES = tuple((role, re.compile(words, re.IGNORECASE)) for role, words in _ROLE_WORDS)

# Buffers that checkpoints hold beside the parameters: rotary frequencies, position ids, causal masks, batch norm's.
_BUFFER = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|token_type_ids|masked_bias|rotary_emb\.\w+"
    r"|running_mean|running_var|num_batches_tracked)$"
)
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")  # the modules that GPT-2 stores (in, out)
_NUMBER = re.compile(r"(0|[1-9]\d{0,5})\Z", re.ASCII)


def is_buffer(name: str, shape: Shape) -> bool:
    """Is this tensor of a checkpoint a buffer, and not a parameter? GPT-2's masks are (1, 1, n, n)."""
    if _BUFFER.search(name):
        return True
    return len(shape) == 4 and shape[:2] == (1, 1) and name.endswith((".bias", ".mask"))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts names by their dotted parts, with numbers as numbers: layer 2 before layer 10."""
    return [(0, int(part), "") if _NUMBER.match(part) else (1, 0, part) for part in name.split(".")]


def role_of(name: str) -> Role:
    """The role that a parameter's name suggests, `other` where it suggests none."""
    module = name.rpartition(".")[0] or name
    inside_layer = _split(name) is not None
    for role, words in _ROLES:
        if words.search(module) and not (role is Role.HEAD and inside_layer):
            return role
    return Role.OTHER


def guess_rows(shapes: Mapping[str, Shape]) -> list[ParamSpec]:
    """Parameter rows in natural order, role and kind of module guessed from names and shapes."""
    rows = []
    for name in sorted(shapes, key=natural_key):
        role = role_of(name)
        rows.append(ParamSpec(name, shapes[name], role, _module_kind(name, role, shapes)))
    return rows


def _module_kind(name: str, role: Role, shapes: Mapping[str, Shape]) -> str:
    module = name.rpartition(".")[0]
    weight = shapes.get(f"{module}.weight", shapes[name])
    if role is Role.NORM and len(weight) < 2:
        return "norm"
    if role is Role.EMBEDDING and len(weight) < 4:  # four dimensions: the convolution that embeds patches
        return "embedding"
    if len(weight) == 2 and _CONV1D.search(module):
        bias = shapes.get(f"{module}.bias")
        if bias is None or bias == weight[1:]:  # implementations of GPT-2 on nn.Linear have bias == out == weight[0]
            return "conv1d"
    return "linear"


def _split(name: str) -> tuple[str, int, str] | None:
    """`a.layers.3.b` as (`a.layers.`, 3, `.b`); None without a number among the dotted parts."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if _NUMBER.match(part):
            before, after = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            return before + "." if before else "", int(part), "." + after if after else ""
    return None


def _layer(row: ParamSpec) -> tuple[str, int]:
    split = _split(row.name)
    return ("", -1) if split is None else split[:2]


def _template(row: ParamSpec) -> ParamSpec:
    split = _split(row.name)
    name = row.name if split is None else f"{split[0]}{{i}}{split[2]}"
    return ParamSpec(name, row.shape, row.role, row.module)


def fold(rows: Iterable[ParamSpec]) -> tuple[Block, ...]:
    """The same rows in blocks: consecutive layers with equal rows become one block that repeats.

    `Block.expand` gives back the rows in their order. The layer number is the first number in a name.
    """
    blocks: list[Block] = []
    for (_, index), group in groupby(rows, key=_layer):
        if index < 0:
            blocks.append(Block(tuple(group)))
            continue
        template = tuple(map(_template, group))
        last = blocks[-1] if blocks else None
        if last is not None and last.rows == template and last.start + last.repeat == index:
            blocks[-1] = Block(template, last.repeat + 1, last.start)
        else:
            blocks.append(Block(template, 1, index))
    return tuple(blocks)
