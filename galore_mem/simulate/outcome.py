"""From a traced run to numbers: the run on its device, each phase, the peak explained, the verdict for a card."""

from __future__ import annotations

from dataclasses import dataclass, replace

from galore_mem.allocator.settings import AllocatorSettings
from galore_mem.gpus import DEFAULT_CONTEXT, Gpu
from galore_mem.result import Fit, Phase
from galore_mem.setup import Setup
from galore_mem.simulate import told
from galore_mem.simulate.device import LINUX, Run, on_cpu, on_cuda, refused_at
from galore_mem.simulate.explain import peak, place_of, timeline
from galore_mem.simulate.history import history
from galore_mem.simulate.loads import Read
from galore_mem.simulate.result import SIMULATED_PHASES, Refusal, Simulation
from galore_mem.simulate.session import Traced
from galore_mem.simulate.trace import Trace


@dataclass(frozen=True, slots=True)
class Target:
    """The device that is simulated, its allocator's settings, and what is wanted of a run besides numbers: a timeline
    of so many points, the run itself."""

    device: str
    settings: AllocatorSettings
    card: Gpu | None = None
    points: int | None = None
    keep_run: bool = False
    platform: str = LINUX

    @property
    def outside(self) -> int:
        """Bytes that the CUDA context takes."""
        return (self.card or DEFAULT_CONTEXT).context if self.device == "cuda" else 0

    def serve(self, trace: Trace) -> tuple[Run, Refusal | None, int | None]:
        """The run, and, where the card is too small for it, the request that it refuses with the number of its event.
        (The run is then one on a card with room.)"""
        if self.device == "cpu":
            return on_cpu(trace), None, None
        if self.card is None:
            return on_cuda(trace, self.settings, platform=self.platform), None, None
        run = on_cuda(trace, self.settings, self.card.capacity, min(self.outside, self.card.capacity), self.platform)
        at = refused_at(run)
        if at is None:
            return run, None, None
        roomy = replace(self.settings, per_process_memory_fraction=1.0)
        return on_cuda(trace, roomy, platform=self.platform), _refusal(run, at), at


def completed(made: Simulation, traced: Traced, setup: Setup, target: Target, read: Read | None = None) -> Simulation:
    """A simulation with all that the trace and the device tell. `read`: as for `history`."""
    trace = traced.trace if traced.whole else history(traced.trace, hooks=setup.layerwise, load=setup.load, read=read)
    run, refusal, refused = target.serve(trace)
    highest, reserved = run.highest(), run.most_reserved()
    weights, gradients, state = traced.measured[:3]
    found = replace(
        made,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_state_bytes=state,
        phases=tuple(
            Phase(name, highest[name].live, None, reserved.get(name), run.slack(highest[name].at))
            for name in (highest if traced.whole else sorted(highest, key=SIMULATED_PHASES.index))
        ),
        outside_allocator_bytes=target.outside,
        peak_reserved_bytes=max(reserved.values(), default=None),
        assumptions=(*made.assumptions, *told.of_run(traced, setup, target.card, target.settings, target.platform)),
        refusal=refusal,
        retries=None if run.replayed is None else run.replayed.stats.num_alloc_retries,
        events=len(trace.events),
        layers_traced=traced.layers,
        timeline=None if target.points is None else timeline(run, target.points, refused),
        run=run if target.keep_run else None,
    )
    top = found.peak.name
    found = replace(found, at_peak=peak(run, highest[top].at, top))
    return found if target.card is None else replace(found, fits=_fit(found, target, trace))


def _refusal(run: Run, at: int) -> Refusal:
    assert run.replayed is not None
    error = run.replayed.out_of_memory
    assert error is not None
    sizes = (error.requested, error.tried, error.allocated, error.reserved, error.free)
    return Refusal(place_of(run.trace, at), *sizes, str(error))


def _fit(made: Simulation, target: Target, trace: Trace) -> Fit:
    """What was served fits; tightly, where cached memory had to be given back for it, or the upper end of what may be
    reserved would not be. What was not, does not; tightly where a card would serve it that is larger by the band."""
    card, told = target.card, made.confidence
    assert card is not None
    band = told.band if told else 0.0
    outside, fraction = made.outside_allocator_bytes, target.settings.per_process_memory_fraction
    room = min(card.capacity - outside, int(fraction * card.capacity))
    needed = made.peak_reserved_bytes or 0
    high = told.high_reserved(needed) if told else needed
    if made.refusal is not None:
        larger = replace(target, card=card._replace(capacity=outside + int((card.capacity - outside) / (1 - band))))
        verdict = "does_not_fit" if larger.serve(trace)[1] is not None else "tight"
    else:
        verdict = "tight" if made.retries or high > room else "fits"
    return Fit(card.name, card.capacity, room - needed, verdict)
