"""The figure of docs/accuracy.md: predicted against measured peaks, and the signed errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from errors import PEAK, Pair

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

MIB, GIB = 2**20, 2**30
# color, marker, its size: the small one is filled
STYLES = {
    "estimate": ("#0072b2", "o", 34),
    "estimate --reserved": ("#009e73", "s", 30),
    "simulate": ("#d55e00", "D", 9),
}
BARS = ((0.02, "#f5f5f5"), (0.01, "#ebebeb"))  # of the errors: what is asked at worst, at the median
LINEAR = 1e-6  # errors below are drawn to scale, larger ones by their logarithm
TICKS = (1e-6, 1e-4, 1e-2)


def draw(panels: Mapping[str, Sequence[Pair]], path: Path) -> bool:
    """A column for each panel that has peaks; False where none has."""
    shown = {title: [p for p in pairs if p.what == PEAK and p.predictor in STYLES] for title, pairs in panels.items()}
    shown = {title: peaks for title, peaks in shown.items() if peaks}
    if not shown:
        return False
    style = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
        "xtick.color": "#444444", "ytick.color": "#444444", "axes.titlesize": 11,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            2, len(shown), figsize=(5.4 * len(shown), 7.2), sharex="col", squeeze=False, layout="constrained",
            height_ratios=(3, 2),
        )  # fmt: skip
        for column, (title, peaks) in enumerate(shown.items()):
            against(axes[0][column], peaks, title)
            signed(axes[1][column], peaks)
        axes[0][0].set_ylabel("predicted peak")
        axes[1][0].set_ylabel("signed error of the peak")
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return True


def by_predictor(peaks: Sequence[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in peaks:
        found.setdefault(pair.predictor, []).append(pair)
    return found


def against(axes: Any, peaks: Sequence[Pair], title: str) -> None:
    low, high = (f(pair.measured for pair in peaks) for f in (min, max))
    limits = (low / 1.3, high * 1.3)
    axes.plot(limits, limits, color="#bbbbbb", linewidth=1, zorder=1)
    for name, own in by_predictor(peaks).items():
        color, marker, size = STYLES[name]
        axes.scatter(
            [p.measured for p in own], [p.predicted for p in own], s=size, marker=marker, zorder=2,
            facecolors="none" if size > 9 else color, edgecolors=color, linewidths=0.9 if size > 9 else 0,
            label=f"{name} ({len(own)} runs)",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    axes.set_title(title, loc="left", pad=10)
    for axis in (axes.xaxis, axes.yaxis):
        in_bytes(axis, limits)
    axes.legend(loc="upper left", frameon=False, handletextpad=0.3)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)


def signed(axes: Any, peaks: Sequence[Pair]) -> None:
    for size, color in BARS:
        axes.axhspan(-size, size, color=color, linewidth=0, zorder=0)
    axes.axhline(0, color="#bbbbbb", linewidth=1, zorder=1)
    for name, own in by_predictor(peaks).items():
        color, marker, _ = STYLES[name]
        axes.scatter(
            [p.measured for p in own], [p.error for p in own], s=12, marker=marker, color=color, alpha=0.55,
            linewidths=0, zorder=2,
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
    most = max(0.03, *(abs(pair.error) * 1.5 for pair in peaks))
    axes.set_ylim(-most, most)
    axes.set_yticks([*(-t for t in reversed(TICKS)), 0, *TICKS])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:+g} %" if value else "0"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
    axes.set_xlabel("measured peak")
    said = f"shaded: within {' and '.join(f'{size:.0%}' for size, _ in reversed(BARS))}".replace("%", " %")
    axes.text(1, 1.02, said, transform=axes.transAxes, ha="right", va="bottom", color="#888888")


def in_bytes(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks at powers of two, named in MiB and GiB."""
    step = 1
    powers = [2**n for n in range(50) if limits[0] <= 2**n <= limits[1]]
    while len(powers) / step > 7:
        step += 1
    axis.set_ticks(powers[::step])
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def shown(size: float) -> str:
    return f"{size / GIB:g} GiB" if size >= GIB else f"{size / MIB:g} MiB"
