"""The table: of every method and implementation of the registry a row that builds it, or the reason why there is none.

Nothing is imported at module level: a package that is missing is that case's status. Where published code does not run
as it is, a row changes the least that lets it run, and says so with the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from galore_mem.memory.phases import Work
from galore_mem.methods.q_galore_torch import GROUP
from galore_mem.methods.randomized import columns
from galore_mem.spec.model import is_target
from galore_mem.verify.builders import (
    GAP,
    LR,
    Builder,
    Request,
    all_together,
    load,
    ours,
    package_version,
    projected,
)
from galore_mem.verify.case import OPTIMIZER, TRAIN

# -- what some need around their run, or refuse ------------------------------------------------------------


def eager() -> AbstractContextManager[Any]:
    """torch.compile does nothing: compiling takes minutes, and state does not depend on it."""
    import torch

    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]  # untyped in torch


def without_synchronize() -> AbstractContextManager[Any]:
    """`torch.cuda.synchronize()` does nothing on a machine without CUDA, where it fails."""
    import torch

    if torch.cuda.is_available():
        return nullcontext()
    return patch.object(torch.cuda, "synchronize", lambda device=None: None)


@contextmanager
def tensorly_with_torch() -> Iterator[None]:
    """tensorly computes with torch's tensors."""
    tensorly = load("tensorly.set_backend"), load("tensorly.get_backend")
    before = tensorly[1]()
    tensorly[0]("pytorch")
    try:
        yield
    finally:
        tensorly[0](before)


def qr_workspace(work: Work) -> int:
    """LAPACK's for the orthogonalization: at most a block of 96 float32 columns as long as the sketch is wide."""
    return 96 * 4 * columns(work.job)


def only_float32(work: Work) -> str | None:
    fmt = work.setup.recipe.weights.name
    return None if fmt == "float32" else f"tensorly's SVD has no {fmt}; use --recipe fp32"


def reverse_needs_room(work: Work) -> str | None:
    """galore-torch 1.0 projects back by the shape of the low-rank gradient."""
    if work.job.hyperparameters.get("proj_type", "std") != "reverse_std":
        return None
    short = min(min(row.shape) for row in work.model.parameters() if len(row.shape) == 2)
    if work.job.rank < short:
        return None
    return f"galore-torch 1.0 cannot project back with reverse_std where the rank ({work.job.rank}) reaches a side"


def misread_by_050(work: Work) -> str | None:
    """Older releases of bitsandbytes understand galore-torch."""
    if package_version("bitsandbytes") < (0, 50):
        return "bitsandbytes before 0.50 reads its arguments as they are meant; use the galore-torch implementation"
    return reverse_needs_room(work)


def whole_groups_only(work: Work) -> str | None:
    """q-galore-torch views codes, and the values of a projector, as rows of 256."""
    for row in work.model.parameters():
        if is_target(row, work.targets) and len(row.shape) == 2:
            values = min(row.shape) * min(work.job.rank, *row.shape)
            if row.count % GROUP or values % GROUP:
                return f"q-galore-torch takes groups of {GROUP} elements, which do not divide {row.name} {row.shape}"
    return None


# -- rows of their own -------------------------------------------------------------------------------------


def adam_mini_package(request: Request) -> Any:
    """adam-mini takes names, and the attention's geometry."""
    heads = request.work.job.heads
    geometry = {} if heads is None else {
        "dim": heads.hidden_size, "n_heads": heads.num_attention_heads, "n_kv_heads": heads.num_key_value_heads,
    }  # fmt: skip
    return load("adam_mini.Adam_mini")(request.named(), lr=LR, verbose=False, **geometry)


def adam_mini_older(request: Request) -> Any:
    """pytorch_optimizer's takes a model, of which it reads `named_parameters()`."""
    heads = request.work.job.heads
    geometry = {} if heads is None else {
        "num_embeds": heads.hidden_size, "num_heads": heads.num_attention_heads,
        "num_query_groups": heads.num_key_value_heads,
    }  # fmt: skip
    return load("pytorch_optimizer.AdamMini")(parameters_of(request), lr=LR, **geometry)


def parameters_of(request: Request) -> Any:
    """What looks like a model to an optimizer that asks for one."""
    return SimpleNamespace(
        named_parameters=lambda: iter(request.named()), parameters=lambda: iter(p for _, p in request.named())
    )


class LastOne:
    """LOMO: its hooks update the parameter before; the last one is updated after the backward pass."""

    def __init__(self, request: Request) -> None:
        self.optimizer = load("lomo_optim.Lomo")(parameters_of(request), lr=LR)
        self.state = self.optimizer.state

    def step(self) -> None:
        self.optimizer.grad_func(0)


class Merging:
    """ReLoRA: AdamW, and a merge of the adapters every `GAP + 1` steps, that is first in step number `GAP`."""

    def __init__(self, request: Request) -> None:
        from galore_mem.optim import ReLoRA

        assert request.model is not None
        self.optimizer = load("torch.optim.AdamW")([m.p for m in request.members], lr=LR, foreach=True)
        self.relora = ReLoRA(request.model, self.optimizer, GAP + 1)
        self.state = self.optimizer.state

    def step(self) -> None:
        self.optimizer.step()
        self.relora.step()


def galore_torch_8bit(request: Request) -> Any:
    """It passes arguments by position to bitsandbytes, which dropped two in 0.50: 100 for `percentile_clipping` became
    `max_unorm`, and True for `block_wise` `skip_zeros`. Both are set to what they were in 0.49."""
    optimizer = galore_torch_8bit_as_is(request)
    if not hasattr(optimizer.args, "percentile_clipping"):
        optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.0, False
    return optimizer


def galore_torch_8bit_as_is(request: Request) -> Any:
    """As its users have it with bitsandbytes 0.50 and later."""
    low = {"rank": request.told["rank"], "update_proj_gap": GAP, "scale": 0.25, "proj_type": request.told["proj_type"]}
    return load("galore_torch.GaLoreAdamW8bit")(request.groups(low), lr=LR)


def flora_package(request: Request) -> Any:
    """Counts steps from 1 and renews its projections where `kappa` divides the number: here in the third."""
    low = {"rank": request.told["rank"]}
    beta1 = request.told["beta1"] or None
    return load("flora_opt.Flora")(request.in_order(low), lr=LR, kappa=GAP + 1, beta1=beta1)


def neuraloperator(request: Request) -> Any:
    rank = int(request.told["rank"])
    optimizer = load("neuralop.training.adamw.AdamW")
    return optimizer(request.groups({"galore": True}), lr=LR, galore_rank=rank)


def q_galore_package(request: Request) -> Any:
    """The package's step around today's bitsandbytes: its own call of the 8-bit kernel is for 0.43."""
    from galore_mem.verify.q_galore import current

    return current(request)


def int8_weight(weight: Any) -> Any:
    import torch

    from galore_mem.optim.int8 import Int8Weight

    return torch.nn.Parameter(Int8Weight.of(weight))


def package_codes(weight: Any) -> Any:
    from galore_mem.verify.q_galore import coded

    return coded(weight)


# -- models that are changed first -------------------------------------------------------------------------


def factorized(model: Any, work: Work) -> Any:
    from galore_mem.optim import factorize

    return factorize(model, work.job.rank, work.targets)


def int8_layers(model: Any, work: Work) -> Any:
    from galore_mem.optim import quantize_linears

    return quantize_linears(model, work.targets)


def relora_adapters(model: Any, work: Work) -> Any:
    from galore_mem.optim import with_adapters

    return with_adapters(model, work.job.rank, work.targets)


def peft_adapters(model: Any, work: Work) -> Any:
    from galore_mem.verify.adapters import lora

    return lora(model, work)


def peft_on_nf4(model: Any, work: Work) -> Any:
    from galore_mem.verify.adapters import qlora

    return qlora(model, work)


def without_matrices() -> AbstractContextManager[Any]:
    from galore_mem.verify.adapters import without_matrices

    return without_matrices()


# -- the table ---------------------------------------------------------------------------------------------

ADAMW, SGD, ADAFACTOR = "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.Adafactor"
KINDS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
MOMENTUM: Mapping[str, Any] = {"momentum": float, "weight_decay": float, "nesterov": bool}
FIRST_MOMENT: Mapping[str, Any] = {"beta1": lambda beta1: beta1 or None}
FACTORED = {"relative_step": False, "scale_parameter": False}  # what the transformers Trainer's "adafactor" passes
QUIET = {"no_deprecation_warning": True}
CHANNEL = {"scale_type": "channel", "proj": "random"}
TENSOR = {"scale_type": "tensor", "proj": "random", "rank": 1}
QR = "the QR driver's workspace, whose size is the library's, is more than a hundredth of it"
RANDOMIZED: Mapping[str, Any] = {"svd": "randomized"}
BY_QR: Mapping[str, Any] = {"workspace": {"refresh": (qr_workspace, QR)}}
COMPILED = "torchao compiles its step: the generated kernels decide its temporaries"
COMPILES: dict[str, Any] = {
    "around": eager, "not_compared": {"step": COMPILED}, "remarks": ("run without torch.compile",),
}  # fmt: skip
NO_PAGES = "bitsandbytes pages nothing on the CPU: this is its ordinary optimizer"
PATCHED = "torch.cuda.synchronize(), which it calls on any machine, patched out"
MISREAD = (
    "bitsandbytes 0.50 and later read its percentile_clipping=100 as max_unorm (4 bytes more a parameter, and tensors "
    "below 4,096 elements hardly move): set back to 0.49's meaning"
)
REPLACED = "its call of bitsandbytes 0.43's kernel replaced by today's (as it is, it fails with 0.44 and later)"
ONCE = "it computes its factors in the first step only, together with its state"
NEURALOP: dict[str, Any] = {
    "needs": ("neuralop", "tensorly"), "around": tensorly_with_torch, "refresh": None, "refuses": only_float32,
    "not_compared": {"refresh": ONCE},
}  # fmt: skip

BUILDERS: dict[tuple[str, str], Builder] = {
    **{("adamw", f"torch-{kind}"): all_together(ADAMW, more=how) for kind, how in KINDS.items()},
    **{("sgd", f"torch-{kind}"): all_together(SGD, MOMENTUM, how) for kind, how in KINDS.items()},
    ("adamw-8bit", "bitsandbytes"): all_together("bitsandbytes.optim.AdamW8bit"),
    ("adamw-8bit", "bitsandbytes-paged"): all_together("bitsandbytes.optim.PagedAdamW8bit", on_cpu=(NO_PAGES,)),
    ("adamw-8bit", "torchao"): all_together("torchao.optim.AdamW8bit", **COMPILES),
    ("adamw-4bit", "torchao"): all_together("torchao.optim.AdamW4bit", **COMPILES),
    ("adamw-fp8", "torchao"): all_together("torchao.optim.AdamWFp8", **COMPILES),
    ("adafactor", "transformers"): all_together("transformers.optimization.Adafactor", FIRST_MOMENT, FACTORED),
    ("adafactor", "torch-loop"): all_together(ADAFACTOR, more={"foreach": False}),
    ("adafactor", "torch-foreach"): all_together(ADAFACTOR, more={"foreach": True}),
    ("came", "came-pytorch"): all_together("came_pytorch.CAME"),
    ("came", "pytorch-optimizer"): all_together("pytorch_optimizer.CAME"),
    ("adam-mini", "galore-mem"): ours("AdamMini"),
    ("adam-mini", "adam-mini"): Builder(adam_mini_package, ("adam_mini",)),
    ("adam-mini", "pytorch-optimizer"): Builder(adam_mini_older, ("pytorch_optimizer",)),
    ("lomo", "lomo-optim"): Builder(LastOne, ("lomo_optim", "transformers"), hooks_itself=True),
    **{
        ("low-rank", f"torch-{kind}"): all_together(ADAMW, more=how, prepare=factorized) for kind, how in KINDS.items()
    },
    **{
        (name, "peft" if kind == "foreach" else f"peft-{kind}"): all_together(
            ADAMW, more=how, prepare=prepare, making=making, quantizes=making is not nullcontext,
            needs=("torch", *needs),
        )
        for name, prepare, making, needs in (
            ("lora", peft_adapters, nullcontext, ("peft",)),
            ("qlora", peft_on_nf4, without_matrices, ("peft", "bitsandbytes")),
        )
        for kind, how in KINDS.items()
    },
    ("relora", "galore-mem"): Builder(
        Merging, ("torch", "peft"), workloads=(TRAIN,), only="it merges the adapters of a model",
        prepare=relora_adapters, settle=1,
    ),
    ("flora", "galore-mem"): ours("Flora"),
    ("flora", "flora-opt"): Builder(flora_package, ("flora_opt", "bitsandbytes", "accelerate")),
    ("galore", "galore-mem"): ours("GaLoreAdamW"),
    ("galore", "galore-mem-randomized"): ours("GaLoreAdamW", RANDOMIZED, **BY_QR),
    ("galore", "galore-torch"): projected(
        "galore_torch.GaLoreAdamW", more=QUIET, needs=("galore_torch", "bitsandbytes"), refuses=reverse_needs_room
    ),
    ("galore", "pytorch-optimizer"): projected(
        "pytorch_optimizer.GaLore", {"projection_type": "std", "update_proj_gap": GAP + 1}
    ),
    ("galore-8bit", "galore-mem"): ours("GaLoreAdamW8bit", needs=("torch", "bitsandbytes")),
    ("galore-8bit", "galore-torch"): Builder(
        galore_torch_8bit, ("galore_torch", "bitsandbytes"), around=without_synchronize, refuses=reverse_needs_room,
        on_cpu=(PATCHED,), remarks=(MISREAD,) if package_version("bitsandbytes") >= (0, 50) else (),
    ),
    ("galore-8bit", "galore-torch-bnb-0.50"): Builder(
        galore_torch_8bit_as_is, ("galore_torch", "bitsandbytes"), around=without_synchronize, on_cpu=(PATCHED,),
        refuses=misread_by_050,
    ),
    ("galore-adafactor", "galore-mem"): ours("GaLoreAdafactor"),
    ("galore-adafactor", "galore-torch"): projected(
        "galore_torch.GaLoreAdafactor", read=FIRST_MOMENT, more=FACTORED, needs=("galore_torch", "bitsandbytes"),
        refuses=reverse_needs_room,
    ),
    ("q-galore", "galore-mem"): ours(
        "QGaLoreAdamW8bit", needs=("torch", "bitsandbytes"), prepare=int8_layers, coded=int8_weight
    ),
    ("q-galore", "galore-mem-float-weights"): ours("QGaLoreAdamW8bit", needs=("torch", "bitsandbytes")),
    ("q-galore", "q-galore-torch"): Builder(
        q_galore_package, ("q_galore_torch", "bitsandbytes"), workloads=(OPTIMIZER,),
        only="its wheel has no INT8 layers", coded=package_codes,
        around=without_synchronize, refuses=whole_groups_only, on_cpu=(PATCHED,),
        remarks=(REPLACED,) if package_version("bitsandbytes") >= (0, 44) else (),
    ),
    ("tensor-galore", "galore-mem"): ours("TensorGaLoreAdamW"),
    ("tensor-galore", "neuraloperator"): Builder(neuraloperator, **NEURALOP),
    ("galore-2", "galore-mem"): ours("GaLoreAdamW", RANDOMIZED, **BY_QR),
    **{
        (name, code): ours("GaLoreMini", {"approach": approach, **arguments}, **row)
        for name, approach in (("galore-mini", 3), ("galore-mini-1", 1), ("galore-mini-2", 2))
        for code, arguments, row in (("galore-mem", {}, {}), ("galore-mem-randomized", RANDOMIZED, BY_QR))
    },
    ("apollo", "apollo-torch"): projected("apollo_torch.APOLLOAdamW", CHANNEL, needs=("apollo_torch", "bitsandbytes")),
    ("apollo-mini", "apollo-torch"): projected(
        "apollo_torch.APOLLOAdamW", TENSOR, needs=("apollo_torch", "bitsandbytes")
    ),
    ("fira", "fira"): projected("fira.FiraAdamW", {"alpha": 1.0}, more=QUIET, needs=("fira", "transformers")),
}  # fmt: skip

NOT_BUILT = {
    ("relora", "relora"): "the authors' code (github.com/Guitaricet/relora, 176f376) is no package of an index",
}
