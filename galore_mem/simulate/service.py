"""`simulate`: training steps of the real model and optimizer, without values, on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version

from galore_mem._version import __version__
from galore_mem.allocator.export import settings_text
from galore_mem.allocator.settings import parse_settings
from galore_mem.errors import InputError, unknown
from galore_mem.estimator import Case, check, given_for, model_json, select, setup_json
from galore_mem.evidence import OWN, confidence
from galore_mem.gpus import gpu as find_gpu
from galore_mem.result import Unsupported
from galore_mem.setup import Setup
from galore_mem.simulate import told
from galore_mem.simulate.device import LINUX, PLATFORMS
from galore_mem.simulate.layers import trace_layers
from galore_mem.simulate.loads import Read
from galore_mem.simulate.outcome import Target, completed
from galore_mem.simulate.programs import trace_own
from galore_mem.simulate.quiet import last_line, quiet
from galore_mem.simulate.result import DECIDED, SimulateResult, Simulation
from galore_mem.simulate.session import Traced
from galore_mem.simulate.subjects import versions
from galore_mem.simulate.subjects.load import UserStep
from galore_mem.simulate.subjects.models import work_of
from galore_mem.simulate.subjects.subject import default_attention, default_length, subject
from galore_mem.spec.model import ModelSpec
from galore_mem.verify.builders import CannotRun, builder
from galore_mem.verify.case import TRAIN

WARM_UP = 1000  # steps, at most
Begun = Callable[[int, int, str], None]  # which of how many runs is at it, and what it does


def simulate(
    model: str | ModelSpec | UserStep,
    methods: Iterable[str] | None = None,
    *,
    setup: Setup | None = None,
    implementation: str | None = None,
    targets: Iterable[str] | None = None,
    gpu: str | None = None,
    allocator: str = "",
    platform: str = LINUX,
    full: bool = True,
    warm_up: int | None = None,
    points: int | None = None,
    keep_run: bool = False,
    begun: Begun = lambda number, of, what: None,
    **hyperparameters: int | float | str | None,
) -> SimulateResult:
    """The memory of training `model` with each method: its steps run on tensors without values, and its allocations go
    through a model of the CUDA caching allocator.

    `model` and `methods` are as for `estimate`; a config.json of any family of transformers, and `module:function`,
    a program of one's own (docs/own.md), are models too. `allocator` is a PYTORCH_ALLOC_CONF; with `gpu` the run
    is on that card, and ends where its memory does; `platform`, linux or windows, is whose driver it is. `full` traces
    every layer; otherwise a few, from which the others follow. `warm_up` is for `module:function`: steps before the one
    that is looked at (1). `points` asks for a timeline of so many, `keep_run` for the run itself (`Simulation.run`).

    The code that runs is the installed torch's and transformers'; what the releases that `setup` names are known to do
    differently is done as they do it. Raises `InputError`.
    """
    asked = subject(model, setup.device if setup else "cuda")
    setup = setup or Setup(seq_len=default_length(asked), attention=default_attention(asked))
    card = find_gpu(gpu) if gpu is not None else None
    if setup.device == "cpu" and (card is not None or allocator):
        raise InputError("--gpu and --alloc-conf are about a card; leave them out with --device cpu")
    setup = replace(setup, compute_capability=(card and card.capability) or setup.compute_capability)
    versions.check(setup)
    if platform not in PLATFORMS:
        raise unknown("platform", platform, PLATFORMS)
    target = Target(setup.device, parse_settings(allocator), card, points, keep_run, platform)
    names = tuple(dict.fromkeys(methods or ()))
    chosen = None if targets is None else tuple(targets)
    if isinstance(asked, UserStep):
        if any((names, implementation, chosen, *hyperparameters.values())):
            raise InputError(f"{asked.reference} brings its own optimizer; leave out the method and its options")
        return _own(asked, setup, target, warm_up, begun, full=full)
    _check(setup, warm_up)
    check(asked, setup, names, "implementation", chosen, hyperparameters)
    cases = [
        Case(asked, setup, found, code, chosen, given_for(found, hyperparameters), card=card)
        for found, code in select(names, implementation, "implementation", setup)
    ]
    runs: list[Simulation] = []
    unsupported: list[Unsupported] = []
    for number, case in enumerate(cases):
        name, code = case.method.name, case.code.name

        def says(what: str, number: int = number, label: str = f"{name} ({code})") -> None:
            begun(number, len(cases), f"{label}: {what}")

        says("the model is built")
        try:
            runs.append(_by_method(case, target, says, full=full))
        except InputError as error:  # one method of all cannot be run with this model or setup
            if names:
                raise InputError(f"{name} ({code}): {error}") from error
            unsupported.append(Unsupported(name, code, str(error)))
    if not runs:
        raise InputError(f"no method can be run: {'; '.join(f'{u.method}: {u.reason}' for u in unsupported)}")
    described = model_json(asked, chosen)
    if asked.num_layers == 1:  # of any family: its rows are not told apart by layers
        described["layers"] = int(asked.config.get("num_hidden_layers", 1))
    return SimulateResult(
        __version__, described, setup_json(setup, chosen, card) | told.stack(setup, target.settings, full=full),
        tuple(runs), tuple(unsupported),
    )  # fmt: skip


def _check(setup: Setup, warm_up: int | None) -> None:
    """Raises `InputError` for what the loop that runs does not do."""
    for given, why in (
        (setup.loss != "eager", f"the model computes its own loss; a {setup.loss} one can be estimated"),
        (warm_up is not None, "--warm-up is for module:function; with a method one step makes the state"),
    ):
        if given:
            raise InputError(why)


def _by_method(case: Case, target: Target, says: Callable[[str], None], *, full: bool) -> Simulation:
    """The run of a method of the registry. Raises `InputError` where it cannot be."""
    work = work_of(case.model, case.setup, case.method.name, case.code.name, case.hyperparameters, case.targets)
    try:
        row = builder(case.method.name, case.code.name)
        row.check(TRAIN, work)
        with quiet():
            traced = trace_layers(work, row, full=full, told=says)
    except CannotRun as error:
        raise InputError(str(error)) from None
    except InputError:
        raise
    except Exception as error:  # of the model's or the optimizer's code
        raise InputError(f"it cannot be run without values: {last_line(error)}") from error
    made = _named(case.method.name, case.code.name, layerwise=work.setup.layerwise)
    made = replace(
        made, hyperparameters=case.hyperparameters, assumptions=tuple(told.of_work(work, row)),
        not_counted=(*told.NOT_COUNTED, *work.code.not_counted),
        confidence=confidence(
            "simulate", work.setup, case.model.family, case.method.name, case.code.name, settings_text(target.settings)
        ),
    )  # fmt: skip
    read = Read(work.setup.recipe.weights.bits // 8, version("peft")) if row.quantizes else None
    return completed(made, traced, work.setup, target, read)


def _own(
    asked: UserStep, setup: Setup, target: Target, warm_up: int | None, begun: Begun, *, full: bool
) -> SimulateResult:  # fmt: skip
    """The run of a program of the user's own. Raises `InputError`."""
    if warm_up is not None and not 0 <= warm_up <= WARM_UP:
        raise InputError(f"warm-up must be between 0 and {WARM_UP}, got {warm_up}")
    default = Setup()
    given = [name for name in DECIDED if getattr(setup, name) != getattr(default, name)]
    if given:
        raise InputError(f"{asked.reference} decides this itself; leave out --{given[0].replace('_', '-')}")
    if setup.recipe.autocast is None and setup.recipe != default.recipe:
        raise InputError(
            f"{asked.reference} decides its model's format; of the recipes give amp-bf16, amp-fp16 or none"
        )
    if not full:
        raise InputError(f"every layer of {asked.reference} is traced; leave out --extrapolate")
    begun(0, 1, asked.reference)
    traced = _traced(asked, setup, warm_up)
    about = asked.told
    kind = "forward" if traced.passes else about["optimizer"] or "program"
    made = _named(kind, about["package"] or "torch", layerwise=setup.layerwise)
    made = replace(
        made, assumptions=tuple(told.of_own(setup, traced, about, 1 if warm_up is None else warm_up)),
        not_counted=tuple(told.not_counted(setup, about)),
        confidence=confidence("simulate", setup, None, OWN, asked.reference, settings_text(target.settings)),
    )  # fmt: skip
    described = (
        setup_json(setup, None, target.card) | dict.fromkeys(DECIDED) | told.stack(setup, target.settings, full=True)
    )
    if setup.recipe.autocast is None:
        described["recipe"] = None
    return SimulateResult(
        __version__,
        {
            "name": asked.reference, "family": None, "parameters": about["parameters"], "parameters_projected": 0,
            "layers": 0, "source": asked.reference,
        },
        described,
        (completed(made, traced, setup, target),),
    )  # fmt: skip


def _traced(asked: UserStep, setup: Setup, warm_up: int | None) -> Traced:
    try:
        with quiet():
            return trace_own(asked, setup, warm_up)
    except InputError as error:
        raise InputError(f"{asked.reference}: {error}") from error
    except Exception as error:  # of the user's code
        raise asked.failed(error) from error


def _named(method: str, implementation: str, *, layerwise: bool) -> Simulation:
    """A simulation before anything has been run."""
    return Simulation(
        method=method, implementation=implementation, convention="implementation", hyperparameters={},
        layerwise=layerwise, weights_bytes=0, gradients_bytes=0, optimizer_state_bytes=0, phases=(),
        outside_allocator_bytes=0, fits=None, assumptions=(), not_counted=(),
    )  # fmt: skip
