"""A run that others measured on a GPU beside its estimate and its simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import gpu_loops
from gpu_loops import FIRST, FORWARD, Subject
from gpu_rows import CARDS, PHASES, Row, every

from galore_mem.allocator.events import Event, Mark
from galore_mem.errors import InputError
from galore_mem.estimator import budget
from galore_mem.gpus import DEFAULT_CONTEXT, GPUS
from galore_mem.memory.phases import Work
from galore_mem.memory.tensor import OPTIMIZER_STATE, WEIGHTS
from galore_mem.simulate import loads
from galore_mem.simulate.device import card, requests
from galore_mem.simulate.result import FIRST as FIRST_STEP
from galore_mem.simulate.trace import Trace

__all__ = ["cases", "run"]
Found = dict[str, Any]
PARAMETERS = (".weight", ".bias")
AS_THEY_RAN = "tracer, their loop and load"  # not the command: the same tracer and allocator


def cases() -> Iterator[Row]:
    return every()


def run(row: Row) -> Found:
    """What was measured, estimated and simulated, in bytes; a predictor that cannot say it says why (`not`)."""
    device = GPUS.get(CARDS.get(row.told["gpu"], ""), DEFAULT_CONTEXT)
    found: Found = {
        "title": row.title, "source": row.told["source"], "gpu": CARDS.get(row.told["gpu"], row.told["gpu"]),
        "family": row.spec.family if row.spec else (row.config or {}).get("model_type"),
        "method": row.told["method"] if row.trains else row.told["mode"],
        "implementation": row.implementation if row.trains else "no optimizer",
        "recipe": row.recipe, "attention": row.setup.attention, "outside": device.context,
        "options": {"gradient_checkpointing": row.setup.gradient_checkpointing, "use_cache": row.loop.use_cache},
        "measured": measured(row), "not": {},
    }  # fmt: skip
    for name, predictor in PREDICTORS.items():
        try:
            found[name] = compared(predictor(row), found["measured"])
        except InputError as error:
            found[name] = None
            found["not"][name] = str(error)
    return found


def compared(predicted: Found, measured: Found) -> Found:
    """What of a prediction has a measured counterpart."""
    found: Found = {}
    for name in set(predicted) & set(measured):
        value = predicted[name]
        found[name] = {k: value[k] for k in value if k in measured[name]} if isinstance(value, dict) else value
    return dict(sorted(found.items()))


def measured(row: Row) -> Found:
    """The row's numbers under our names; those that were not recorded are left out."""
    m = row.measured
    parts: Mapping[str, int] = m.get("weight_breakdown_bytes") or {}
    residents = {
        "weights": sum(parts.values()) or None, "gradients": m.get("gradient_bytes"),
        "optimizer_state": m.get("optimizer_state_bytes"),
    }  # fmt: skip
    found: Found = {
        "peak": m.get("peak_allocated_bytes"),
        "phases": {name: m[key] for name, key in PHASES.items() if key in m},
        "residents": {name: n for name, n in residents.items() if n},
        "loaded": m.get("after_load_allocated_bytes") or m.get("weights_bytes"),
        "after the first step": m.get("gradients_plus_optimizer_bytes"),
        "reserved": m.get("peak_reserved_bytes"),
        "outside": m.get("cuda_context_bytes") or m.get("outside_allocator_bytes"),
    }
    return {name: n for name, n in found.items() if n or isinstance(n, dict)}


def estimated(row: Row, *, reserved: bool = False) -> Found:
    if not row.trains:
        raise InputError("it is inference")
    if row.headless:
        raise InputError("no encoder without a head")
    made = budget(row.case, reserved=reserved)
    phases = {phase.name: phase.allocated_bytes for phase in made.phases}
    phases["forward"] = max(phases["forward"], phases.pop("loss"))
    stays = made.weights_bytes, made.gradients_bytes, made.optimizer_state_bytes
    found: Found = {
        "peak": max(phases[name] for name in PHASES),
        "phases": {name: phases[name] for name in PHASES},
        "residents": dict(zip(("weights", "gradients", "optimizer_state"), stays, strict=True)),
        "loaded": phases["load"],
    }
    return found | ({"reserved": made.peak_reserved_bytes} if reserved else {})


# -- simulate ------------------------------------------------------------------------------------------------


def simulated(row: Row) -> Found:
    """The command's own answer: its loop, told what the source's keeps; the model is put there tensor by tensor."""
    from galore_mem.simulate import simulate

    if not row.trains:
        raise InputError("it is inference")
    if row.headless:
        raise InputError("an encoder without a head has no loss of its own")
    case = row.case
    given = dict(case.hyperparameters)
    (made,) = simulate(
        case.model,
        [case.method.name],
        setup=case.setup,
        implementation=case.code.name,
        targets=case.targets,
        keep_run=True,
        **given,
    ).estimates
    assert made.run is not None
    assert made.run.replayed is not None
    phases = {phase.name: phase.allocated_bytes for phase in made.phases}
    loaded = next(phase for phase in made.run.replayed.phases if phase.name == FIRST_STEP)
    stays = made.weights_bytes, made.gradients_bytes, made.optimizer_state_bytes
    return {
        "peak": max(phases[name] for name in PHASES),
        "phases": {name: phases[name] for name in PHASES},
        "residents": dict(zip(("weights", "gradients", "optimizer_state"), stays, strict=True)),
        "loaded": loaded.start_allocated_bytes,
        "reserved": made.peak_reserved_bytes,
    }


def as_they_ran(row: Row) -> Found:
    """The trace of the source's own loop, replayed from its own way to load the model."""
    from galore_mem.allocator.expandable import new_allocator
    from galore_mem.allocator.replay import replay

    trace = traced(row)
    result = replay(events(row, trace), allocator=new_allocator(None, card()))
    loaded = next(phase for phase in result.phases if phase.name == FIRST)
    steady = [phase for phase in result.phases if phase.name in PHASES]
    phases: dict[str, int] = {}
    for phase in steady:
        phases[phase.name] = max(phases.get(phase.name, 0), phase.peak_allocated_bytes)
    return {
        "peak": max(phases.values()),
        "phases": phases,
        "residents": residents(trace),
        "loaded": loaded.start_allocated_bytes,
        "after the first step": steady[0].start_allocated_bytes - loaded.start_allocated_bytes,
        "reserved": max(phase.peak_reserved_bytes for phase in steady),
    }


def residents(trace: Trace) -> dict[str, int]:
    """Bytes of parameters as they were loaded, with what belongs to quantized ones, and of the optimizer's state at the
    end. (Buffers that a model computes are neither.)"""
    loaded = [one.one for one in loads.stays(trace, trace.marks[0].at)]
    last = [trace.allocations[i] for i in trace.alive(len(trace.events))]
    return {
        "weights": sum(one.nbytes for one in loaded if one.category == WEIGHTS and one.name.endswith(PARAMETERS)),
        "optimizer_state": sum(one.nbytes for one in last if one.category == OPTIMIZER_STATE),
    }


def traced(row: Row) -> Trace:
    from galore_mem.simulate.session import trace
    from galore_mem.simulate.subjects.models import work_of
    from galore_mem.verify.builders import CannotRun, builder
    from galore_mem.verify.case import TRAIN

    if row.headless:
        return trace(partial(_encoder, row), row.setup).trace
    case = row.case
    work = work_of(case.model, case.setup, case.method.name, case.code.name, case.hyperparameters, case.targets)
    code = builder(case.method.name, case.code.name)
    try:
        code.check(TRAIN, work)
    except CannotRun as error:
        raise InputError(str(error)) from None

    def program(meter: Any) -> None:
        with code.around():
            model, optimizer = _built(row, work, code)
            if row.trains:
                _train(row, meter, model, optimizer)
            else:
                model.config.use_cache = True
                gpu_loops.infer(model.eval(), partial(_ids, row), meter.enter)

    return trace(program, row.setup).trace


def _built(row: Row, work: Work, code: Any) -> tuple[Any, Any]:
    """The model and the optimizer, as `verify` makes them."""
    from galore_mem.verify.builders import Request
    from galore_mem.verify.models import members_of, transformers_model

    with code.making():
        model: Any = transformers_model(work, _device())
    model.config.use_cache = row.loop.use_cache
    if code.prepare is not None:
        model = code.prepare(model, work)
    return model, code.make(Request(members_of(model, work), work, model))


def _encoder(row: Row, meter: Any) -> None:
    import torch
    from transformers import AutoModel

    from galore_mem.simulate.subjects.models import config_of

    given = row.config or (row.spec.config if row.spec else {})
    kept = {name: value for name, value in given.items() if name != "architectures"}
    with _device():
        model = AutoModel.from_config(config_of(kept), attn_implementation=row.setup.attention)
    model.train()
    _train(row, meter, model, torch.optim.AdamW(model.parameters()))


def _train(row: Row, meter: Any, model: Any, optimizer: Any) -> None:
    import contextlib

    import torch

    fmt = row.setup.recipe.autocast

    def context() -> Any:
        return contextlib.nullcontext() if fmt is None else torch.autocast("meta", getattr(torch, fmt.name))

    inputs, loss = (_alone, gpu_loops.mean_square) if row.headless else (gpu_loops.with_labels, _own_loss)
    gpu_loops.run(row.loop, Subject(model, optimizer, partial(_ids, row), inputs, loss, context), meter.enter)


def _ids(row: Row) -> Any:
    import torch

    return torch.randint(100, (row.setup.batch_size, row.setup.seq_len), device=_device())


def _device() -> Any:
    import torch

    return torch.device("meta")


def _alone(ids: Any) -> Mapping[str, Any]:
    return {"input_ids": ids}


def _own_loss(outputs: Any) -> Any:
    return outputs.loss


def events(row: Row, trace: Trace) -> Iterator[Event]:
    """The run as the allocator sees it: the load, then the trace from the first step on, with the caches that the loop
    empties."""
    begin = trace.marks[0].at
    kept = loads.stays(trace, begin)
    yield Mark(gpu_loops.LOADED)
    if row.told["method"] == "qlora":
        yield from loads.quantized(kept, row.setup.recipe.weights.bits // 8, row.told["versions"].get("peft", "0"))
    else:
        yield from loads.WAYS[row.setup.load](kept)
    marks = [mark._replace(at=mark.at - begin) for mark in trace.marks]
    emptied = [mark.at for mark in marks if mark.phase == FORWARD] if row.loop.empties_cache else []
    yield from requests(replace(trace, events=trace.events[begin:], marks=marks, emptied=emptied))


PREDICTORS: dict[str, Callable[[Row], Found]] = {
    "estimate": estimated, "estimate --reserved": partial(estimated, reserved=True), "simulate": simulated,
    AS_THEY_RAN: as_they_ran,
}  # fmt: skip
