"""The timeline as one HTML file: drawn inline, nothing loaded from elsewhere; what is under the pointer is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape

from galore_mem.memory.tape import CATEGORIES
from galore_mem.report import timeline as drawing
from galore_mem.simulate.result import SimulateResult, Simulation, Timeline
from galore_mem.units import GIB, KIB, MIB, format_bytes

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 1100, 340, 64, 26, 30  # of a panel, in units of its viewBox
LINES = 5  # of the grid, at most

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em auto; max-width: 1180px; color: #222 }
h1 { font-size: 1.15em } h2 { font-size: 1em; margin: 1.4em 0 .2em } svg { width: 100%; height: auto }
text { font: 11px system-ui, sans-serif; fill: #333 } .key i { display: inline-block; width: .8em; height: .8em;
margin: 0 .35em 0 1em } .told { min-height: 1.4em; font-variant-numeric: tabular-nums }
"""
SCRIPT = """
const size = n => n >= 2**30 ? (n / 2**30).toFixed(2) + ' GiB' : (n / 2**20).toFixed(2) + ' MiB';
for (const svg of document.querySelectorAll('svg')) {
  const run = JSON.parse(document.getElementById(svg.dataset.run).textContent);
  const told = svg.nextElementSibling, cursor = svg.querySelector('.cursor');
  svg.addEventListener('mousemove', e => {
    const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const event = (p.x - run.left) / run.width * run.events;
    let i = run.at.findIndex(at => at >= event);
    if (i < 0) i = run.at.length - 1;
    const phase = run.phases.filter(q => q.at <= run.at[i]).pop();
    let total = 0, parts = [];
    for (const name of run.names) if (run[name][i]) {
      total += run[name][i];
      parts.push(name.replaceAll('_', ' ') + ' ' + size(run[name][i]));
    }
    told.textContent = 'event ' + run.at[i] + ', ' + (phase ? phase.name : '') + ': ' + size(total) + ' = ' +
      parts.join(' + ') + (run.reserved_bytes ? '; reserved ' + size(run.reserved_bytes[i]) : '');
    const x = run.left + run.at[i] / run.events * run.width;
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x); cursor.style.display = '';
  });
}
"""


def page(result: SimulateResult, runs: Sequence[Simulation]) -> str:
    """All runs, one below the other, on one scale."""
    highest = drawing.ceiling(runs)
    colors = {**drawing.COLORS, "reserved": drawing.RESERVED}
    key = "".join(f'<i style="background:{c}"></i>{name.replace("_", " ")}' for name, c in colors.items())
    body = "".join(_run(result, run, i, highest) for i, run in enumerate(runs))
    name = escape(drawing.title(result))
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    content = f'<h1>{name}</h1><p class="key">{key}</p>\n{body}<script>{SCRIPT}</script>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{content}</body></html>\n'


def _run(result: SimulateResult, run: Simulation, number: int, highest: int) -> str:
    line = run.timeline
    assert line is not None
    data = {**line.to_json(), "names": list(CATEGORIES), "left": LEFT, "width": WIDTH - LEFT}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    heading = escape(f"{run.method} ({run.implementation}): {drawing.label(run)}")
    parts = "\n".join(_parts(result, run, line, highest))
    return (
        f'<h2>{heading}</h2>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-run="run{number}" role="img">\n{parts}\n</svg>\n'
        f'<p class="told">&nbsp;</p>\n<script type="application/json" id="run{number}">{text}</script>\n'
    )


def _parts(result: SimulateResult, run: Simulation, line: Timeline, highest: int) -> Iterator[str]:
    """The elements of a panel, from the back to the front."""

    def x(at: int) -> float:
        return round(LEFT + at / line.events * (WIDTH - LEFT), 1)

    def y(n: int) -> float:
        return round(TOP + (1 - n / highest) * (HEIGHT - TOP - BOTTOM), 1)

    yield from _grid(highest, y)
    below = [0] * len(line.at)
    for i, name in enumerate(CATEGORIES):
        above = [n + live[i] for n, live in zip(below, line.live, strict=True)]
        if above != below:
            forth = " ".join(f"{x(at)},{y(n)}" for at, n in zip(line.at, above, strict=True))
            back = " ".join(f"{x(at)},{y(n)}" for at, n in zip(reversed(line.at), reversed(below), strict=True))
            yield f'<polygon fill="{drawing.COLORS[name]}" points="{forth} {back}"/>'
        below = above
    if line.reserved is not None:
        points = " ".join(f"{x(at)},{y(n)}" for at, n in zip(line.at, line.reserved, strict=True))
        yield f'<polyline fill="none" stroke="{drawing.RESERVED}" points="{points}"/>'
    limit = drawing.room(run)
    if limit is not None and limit < highest:
        yield _line(LEFT, y(limit), WIDTH, y(limit), f'stroke="{drawing.LIMIT}" stroke-dasharray="6 4"')
        yield f'<text x="{LEFT + 4}" y="{y(limit) - 4}">room on {escape(str(result.setup["gpu"]))}</text>'
    for span in drawing.spans(line):
        yield _line(x(span.start), TOP, x(span.start), HEIGHT - BOTTOM, 'stroke="#0003"')
        if span.end - span.start > drawing.NARROW * line.events:
            middle = x((span.start + span.end) // 2)
            yield f'<text x="{middle}" y="{TOP - 8}" text-anchor="middle">{escape(span.name)}</text>'
    if line.refused_at is not None:
        at = x(line.refused_at)
        yield _line(at, TOP, at, HEIGHT - BOTTOM, f'stroke="{drawing.LIMIT}"')
        yield f'<text x="{at + 4}" y="{TOP + 12}">out of memory</text>'
    i = drawing.summit(line, run.peak.name)
    yield f'<circle cx="{x(line.at[i])}" cy="{y(sum(line.live[i]))}" r="4"/>'
    yield _line(0, TOP, 0, HEIGHT - BOTTOM, 'class="cursor" stroke="#000" style="display:none"')


def _line(x1: float, y1: float, x2: float, y2: float, how: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {how}/>'


def _grid(highest: int, y: Callable[[int], float]) -> Iterator[str]:
    step = _step(highest)
    for n in range(0, highest, step):
        yield _line(LEFT, y(n), WIDTH, y(n), 'stroke="#0001"')
        yield f'<text x="{LEFT - 6}" y="{y(n) + 4}" text-anchor="end">{format_bytes(n, 0)}</text>'
    yield f'<text x="{WIDTH}" y="{HEIGHT - 8}" text-anchor="end">allocations and releases</text>'


def _step(highest: int) -> int:
    """Bytes between two lines: 1, 2 or 5 times a power of ten of a unit, so that there are `LINES` or fewer."""
    unit = max(size for size in (1, KIB, MIB, GIB) if size == 1 or highest >= LINES * size)
    factor = 1
    while highest > 5 * LINES * factor * unit:
        factor *= 10
    return next(many * factor * unit for many in (1, 2, 5) if highest <= LINES * many * factor * unit)
