"""`estimate`: a budget per method, phase by phase, in closed form: no torch, no GPU, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from galore_mem._version import __version__
from galore_mem.errors import InputError, unknown_of
from galore_mem.evidence import FOLLOWED, Confidence, confidence, reserve
from galore_mem.families import family
from galore_mem.gpus import DEFAULT_CONTEXT, Gpu
from galore_mem.gpus import gpu as find_gpu
from galore_mem.ledger import Entry, ledger, registered, totals
from galore_mem.memory.kept import kept_by_layer
from galore_mem.memory.phases import CUBLAS_WORKSPACES, Phases, Work, cublas_workspace, stepping, training
from galore_mem.methods.adamw_8bit import with_own_tables
from galore_mem.methods.base import RANK, UPDATE_PROJ_GAP, Implementation, Job, Method
from galore_mem.methods.registry import METHODS, method
from galore_mem.result import Estimate, EstimateResult, Phase, Unsupported
from galore_mem.setup import LOADED, LOADS, Setup
from galore_mem.spec.model import ModelSpec, check_targets, is_target
from galore_mem.spec.resolve import resolve
from galore_mem.units import format_bytes, round_up
from galore_mem.verdict import fit

GENERAL_NOT_COUNTED = (
    "fragmentation and the allocator's cache (reserved memory)",
    "NCCL and other libraries' buffers; the data loader; evaluation",
)


def estimate(
    model: str | ModelSpec,
    methods: Iterable[str] | None = None,
    *,
    setup: Setup | None = None,
    implementation: str | None = None,
    convention: str = "implementation",
    targets: Iterable[str] | None = None,
    gpu: str | None = None,
    explain: bool = False,
    reserved: bool = False,
    **hyperparameters: int | float | str | None,
) -> EstimateResult:
    """How much memory training `model` takes with each method.

    `model` is what `--model` takes (a bundled name, a config.json, a folder, a safetensors file, a cached hub id)
    or a `ModelSpec`; `methods` are names of the registry (None: all); `implementation` is a name, `all`, or None
    for each method's default; `targets` names the linears that low-rank methods apply to; `hyperparameters` are
    `rank`, `update_proj_gap` and what else a method declares. `reserved` follows the CUDA allocator too (a tenth to a
    third of a second a method): what it reserves, and in the peaks what its blocks leave unused. Raises `InputError`
    for anything unknown or impossible.
    """
    spec = resolve(model) if isinstance(model, str) else model
    setup = setup or Setup(seq_len=default_seq_len(spec))
    card = find_gpu(gpu) if gpu is not None else None
    if card is not None and setup.device == "cpu":
        raise InputError("--gpu asks about a card; leave it out with --device cpu")
    if card is not None and card.capability is not None:
        setup = replace(setup, compute_capability=card.capability)
    chosen = tuple(targets) if targets is not None else None
    asked = tuple(dict.fromkeys(methods or ()))
    check(spec, setup, asked, convention, chosen, hyperparameters)
    if reserved and (setup.device == "cpu" or convention == "paper"):
        raise InputError("--reserved follows the CUDA allocator; leave it out with --device cpu or --convention paper")
    if setup.load != LOADS[0] and not reserved:
        raise InputError("how a model comes to the card is about the allocator's blocks; give --reserved with --load")
    cache: dict[object, Phases] = {}
    answers: list[Estimate] = []
    unsupported: list[Unsupported] = []
    for found, code in select(asked, implementation, convention, setup):
        case = Case(spec, setup, found, code, chosen, given_for(found, hyperparameters), convention, card)
        try:
            answers.append(budget(case, cache, explain=explain, reserved=reserved))
        except InputError as error:  # one method of all cannot handle this model or setup
            if asked:
                raise
            unsupported.append(Unsupported(found.name, code.name, str(error)))
    if not answers:
        raise InputError(f"no method can answer: {'; '.join(f'{u.method}: {u.reason}' for u in unsupported)}")
    return EstimateResult(
        __version__, model_json(spec, chosen), setup_json(setup, chosen, card), tuple(answers), tuple(unsupported)
    )


class Case(NamedTuple):
    """One method under one implementation (or the paper's counting), for one model and setup."""

    model: ModelSpec
    setup: Setup
    method: Method
    code: Implementation
    targets: tuple[str, ...] | None
    hyperparameters: Mapping[str, int | float | str]
    convention: str = "implementation"
    card: Gpu | None = None

    def work(self) -> Work:
        """The case as the phases run it: layer-wise where the method always is, or whole where its code cannot be."""
        setup, spec = self.setup, self.model
        if self.method.always_layerwise:
            setup = replace(setup, layerwise=True, keep_gradients=False, gradient_accumulation=1)
        elif not self.code.layerwise:
            setup = replace(setup, layerwise=False)
        if setup.waits and (self.code.compresses is None or setup.recipe.master is not None):
            raise InputError(
                f"{self.method.name} ({self.code.name}) steps in every backward pass, so its layer-wise update cannot "
                "accumulate gradients"
                + (f" in {setup.recipe.name}" if self.code.compresses else "")
                + "; leave out --layerwise or --gradient-accumulation"
            )
        code = with_own_tables(self.code) if setup.layerwise and self.code.one_each else self.code
        job = Job(self.hyperparameters, setup.recipe, setup.device, spec.heads)
        forward = family(spec.family).forward if spec.family is not None else None
        return Work(spec, setup, code, job, self.targets, forward)


def check(
    spec: ModelSpec,
    setup: Setup,
    asked: Sequence[str],
    convention: str,
    targets: tuple[str, ...] | None,
    hyperparameters: Mapping[str, int | float | str | None],
) -> None:
    """Raises `InputError` for what no method can be asked about this model."""
    if convention not in ("implementation", "paper"):
        raise InputError(f"unknown convention {convention!r}; known: implementation, paper")
    check_targets(spec, targets)
    check_hyperparameters(asked, hyperparameters)
    if setup.attention == "flash":
        check_flash(setup)
    limit = max_positions(spec)
    if limit is not None and spec.family in LEARNED_POSITIONS and setup.seq_len > limit:
        raise InputError(
            f"seq-len {setup.seq_len} is beyond the {limit} positions {spec.name} has learned; give --seq-len {limit}"
        )


COMMON = ("rank", "update_proj_gap")  # options of their own, which methods without a projector leave alone


def check_hyperparameters(asked: Sequence[str], given: Mapping[str, int | float | str | None]) -> None:
    """Raises `InputError` for a hyperparameter that none of the methods has, or a value that it cannot have."""
    found = [method(name) for name in asked] or list(METHODS.values())
    declared = [h for m in found for h in m.hyperparameters]
    for name, value in given.items():
        if value is None:
            continue
        meant = [h for h in declared if h.name == name]
        if not meant and name not in COMMON:
            raise unknown_of(asked, "hyperparameter", name, {h.name for h in declared})
        for h in meant or (RANK, UPDATE_PROJ_GAP):
            if h.name == name:
                h.read(value)


def check_flash(setup: Setup) -> None:
    """Raises `InputError` where FlashAttention cannot run: it needs a 16-bit format and compute capability 8.0."""
    computed = setup.recipe.autocast or setup.recipe.weights
    if setup.device != "cuda":
        raise InputError("flash attention needs a CUDA device; use --attention sdpa with --device cpu")
    if computed.bits != 16:
        raise InputError(f"flash attention needs a 16-bit format, and {setup.recipe.name} computes in {computed}")
    if setup.compute_capability is not None and setup.compute_capability < (8, 0):
        raise InputError("flash attention needs compute capability 8.0, which this card has not; use --attention sdpa")


LEARNED_POSITIONS = ("gpt2", "bert", "roberta")


def max_positions(spec: ModelSpec) -> int | None:
    """The longest sequence the model's position table allows, where its config says so."""
    for key in ("max_position_embeddings", "n_positions"):
        if key in spec.config:
            # RoBERTa's table has two rows more than positions (padding_idx + 1)
            return int(spec.config[key]) - (2 if spec.family == "roberta" else 0)
    return None


def default_seq_len(spec: ModelSpec) -> int:
    """2048 tokens, or the model's maximum where that is lower."""
    return min(2048, max_positions(spec) or 2048)


def select(
    asked: Sequence[str], implementation: str | None, convention: str, setup: Setup
) -> Iterable[tuple[Method, Implementation]]:
    """The methods and implementations that were asked for, in the registry's order when none is named."""
    found = list(METHODS.values()) if not asked else [method(name) for name in asked]
    matched = False
    for one in found:
        if convention == "paper":
            codes: tuple[Implementation, ...] = (one.paper,)
        elif implementation == "all":
            codes = one.implementations
        elif not asked and implementation is not None:
            codes = tuple(c for c in one.implementations if c.name == implementation)
        else:
            codes = (one.implementation(implementation),)
        for code in codes:
            if setup.layerwise and not code.layerwise and asked:
                raise InputError(f"{one.name} ({code.name}) has no layer-wise update; leave out --layerwise")
            matched = True
            yield one, code
    if not matched:
        known = {c.name for m in METHODS.values() for c in m.implementations}
        raise unknown_of((), "implementation", str(implementation), known)


def given_for(found: Method, given: Mapping[str, int | float | str | None]) -> dict[str, int | float | str]:
    """The method's hyperparameters: what was given, the defaults otherwise."""
    values: dict[str, int | float | str] = {}
    for h in found.hyperparameters:
        value = given.get(h.name)
        values[h.name] = h.default if value is None else h.read(value)
    return values


def budget(
    case: Case, cache: dict[object, Phases] | None = None, *, explain: bool = False, reserved: bool = False
) -> Estimate:
    """The estimate of one case. `cache` shares forward and backward passes between cases of one model and setup;
    `reserved` follows the allocator."""
    work = case.work()
    entries = tuple(ledger(work.model, work.code, work.job, work.targets))
    buffers = tuple(registered(work.model, work.setup))
    phases, kernels = _phases(work, entries, cache if cache is not None else {})
    sums = totals(entries, work.setup)
    made = Estimate(
        method=case.method.name,
        implementation=case.code.name,
        convention=case.convention,
        hyperparameters=case.hyperparameters,
        layerwise=work.setup.layerwise,
        weights_bytes=sums["weights"],
        gradients_bytes=sums["gradients"],
        optimizer_state_bytes=sums["optimizer_state"],
        phases=phases,
        outside_allocator_bytes=(case.card or DEFAULT_CONTEXT).context if work.setup.device == "cuda" else 0,
        fits=None,
        assumptions=tuple(_assumptions(work, case.setup, kernels, case.card)),
        not_counted=tuple(_not_counted(work)),
        equations=work.code.equations,
        entries=(*entries, *buffers),
        buffers_bytes=sum(e.total for e in buffers),
        kept=kept_by_layer(work) if explain else (),
        confidence=_confidence(case, work),
        reserve=reserve(work.setup.attention) if work.setup.device == "cuda" and case.convention != "paper" else None,
    )
    if reserved:
        made = _followed(made, work)
    return made if case.card is None else replace(made, fits=fit(made, case.card))


def _followed(made: Estimate, work: Work) -> Estimate:
    """The estimate with its phases as the allocator has them. (What a layer adds is the closed form's.)"""
    from galore_mem.followed import follow  # the allocator's model is not loaded before it is asked for

    found = follow(work)
    layers = {phase.name: phase.per_layer for phase in made.phases}
    told_by = confidence(FOLLOWED, work.setup, work.model.family, made.method, made.implementation)
    phases = tuple(phase._replace(per_layer=layers[phase.name]) for phase in found.phases)
    told = (
        "caching allocator (default settings), one stream; one step that makes the state before those shown; "
        f"a model comes to the card by {LOADED[work.setup.load]}; a quantized one matrix by matrix"
    )
    return replace(
        made, phases=phases, peak_reserved_bytes=found.reserved, reserve=None, confidence=told_by,
        assumptions=(*made.assumptions, told),
        not_counted=tuple(one for one in made.not_counted if one != GENERAL_NOT_COUNTED[0]),
    )  # fmt: skip


def _confidence(case: Case, work: Work) -> Confidence | None:
    if case.convention == "paper":
        return None
    return confidence("estimate", work.setup, case.model.family, case.method.name, case.code.name)


def _phases(
    work: Work, entries: tuple[Entry, ...], cache: dict[object, Phases]
) -> tuple[tuple[Phase, ...], frozenset[str]]:
    """Each phase's highest moment, and the attention kernels that ran."""
    passed = _layerwise(work) if work.setup.layerwise else _whole(work, entries, cache)
    return tuple(Phase(name, m.live, m.per_layer) for name, m in passed.peaks.items()), passed.kernels


def _layerwise(work: Work) -> Phases:
    """The hooks step inside backward: one pass as it usually is, one in which projectors are renewed."""
    passed = training(work)
    if not work.code.refreshes:
        return passed
    renewing = training(work, refresh=True).peaks
    # where gradients are whole until the last pass, the forward passes between are part of it
    within = ("refresh", "forward", "loss") if work.setup.waits else ("refresh",)
    highest = max((renewing[name] for name in within if name in renewing), key=lambda moment: sum(moment.live))
    return replace(passed, peaks={**passed.peaks, "refresh": highest})


def _whole(work: Work, entries: tuple[Entry, ...], cache: dict[object, Phases]) -> Phases:
    """Passes of the model with the state lying there, then the step over all parameters."""
    code, grain = work.code, work.setup.granularity
    key = (code.store, code.linear, tuple(work.job.hyperparameters.items()) if code.linear != "dense" else ())
    passed = cache[key] if key in cache else cache.setdefault(key, training(work))
    state = sum(round_up(e.nbytes, grain) * e.repeat for e in entries if e.kind == "optimizer_state" and not e.host)
    peaks = {name: m if name == "load" else m.plus((0, 0, state, 0, 0)) for name, m in passed.peaks.items()}
    peaks |= {name: m.plus(passed.retained) for name, m in stepping(work).peaks.items()}
    return replace(passed, peaks=peaks)


def _assumptions(work: Work, asked: Setup, kernels: frozenset[str], card: Gpu | None) -> Iterable[str]:
    setup, job = work.setup, work.job
    r = setup.recipe
    if (asked.keep_gradients, asked.gradient_accumulation) != (setup.keep_gradients, setup.gradient_accumulation):
        yield "gradients are freed one by one and not accumulated, whatever the options say: it has no other step"
    yield (
        f"recipe {r.name}: weights and gradients {r.weights}"
        + (f", autocast {r.autocast}" if r.autocast else "")
        + (f", master weights {r.master}" if r.master else "")
    )
    yield f"a step in steady state: optimizer state exists; {setup.loop}"
    if setup.waits:
        yield (
            f"parameters are updated in the last of {setup.gradient_accumulation} backward passes; until then "
            "gradients are summed, in the low-rank space where the method can"
        )
    if work.forward is not None:
        yield (
            f"eager PyTorch {setup.torch}, transformers {setup.transformers}, attention {setup.attention}, "
            f"loss {setup.loss}, "
            + ("non-reentrant checkpointing of each layer" if setup.gradient_checkpointing else "no checkpointing")
        )
        if kernels:
            yield f"attention kernel {', '.join(sorted(kernels))}"
    if setup.device == "cuda":
        context = card or DEFAULT_CONTEXT
        yield f"CUDA context {format_bytes(context.context)}: {context.evidence}"
        yield (
            f"allocator blocks of {setup.granularity} bytes; {CUBLAS_WORKSPACES} cuBLAS workspaces of "
            f"{cublas_workspace(setup):,} bytes, among the temporaries"
        )
    if "rank" in job.hyperparameters:
        clipped = sum(
            repeat for row, repeat in work.model.groups() if is_target(row, work.targets) and job.rank > min(row.shape)
        )
        where = f"rank {job.rank} is above the smaller side of {clipped} matrices"
        if clipped:
            factors = work.code.linear in ("lora", "nf4", "low-rank")
            yield (
                f"{where}; factors of that rank are larger than the matrix"
                if factors
                else f"{where}, where it is clipped"
            )
    yield from work.code.notes


def _not_counted(work: Work) -> Iterable[str]:
    if work.forward is None:
        yield "activations: the model's architecture is not known (only tensor shapes); give its config.json"
    yield from GENERAL_NOT_COUNTED
    yield from work.code.not_counted


def model_json(spec: ModelSpec, targets: tuple[str, ...] | None) -> dict[str, Any]:
    """The model as JSON: name, family, counts of parameters and where the spec comes from."""
    return {
        "name": spec.name,
        "family": spec.family,
        "parameters": spec.parameter_count,
        "parameters_projected": sum(row.count * n for row, n in spec.groups() if is_target(row, targets)),
        "layers": spec.num_layers,
        "source": spec.source,
    }


def setup_json(setup: Setup, targets: tuple[str, ...] | None, card: Gpu | None) -> dict[str, Any]:
    """The setup as JSON, under the names of the command line's options."""
    return {
        "recipe": setup.recipe.name,
        "batch_size": setup.batch_size,
        "seq_len": setup.seq_len,
        "attention": setup.attention,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "loss": setup.loss,
        "layerwise": setup.layerwise,
        "keep_gradients": setup.keep_gradients,
        "keep_logits": setup.keep_logits,
        "use_cache": setup.use_cache,
        "load": setup.load,
        "gradient_accumulation": setup.gradient_accumulation,
        "transformers": setup.transformers,
        "torch": setup.torch,
        "device": setup.device,
        "target": None if targets is None else list(targets),
        "gpu": None if card is None else card.name,
    }
