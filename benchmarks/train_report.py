"""From the record of `train.py` to docs/training.md and its figure: perplexity beside memory, loss curves, spikes."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import fmean, median
from textwrap import fill
from typing import Any

import matplotlib
from train_methods import METHODS
from train_run import Settings

import galore_mem
from galore_mem.setup import recipe

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Line = dict[str, Any]
Runs = dict[str, dict[float, list[Line]]]  # by method and learning rate, in the order of the seeds

WINDOW = 10  # steps that the curves are averaged over


class SPIKE:
    """What counts as one: a rise in nats per byte, within so many steps, of means of so many steps."""

    rise, steps, window = 0.25, 20, 5


BEGIN, END = "<!-- results: written by benchmarks/train.py -->\n", "<!-- end of results -->\n"
RESULTS = re.compile(f"(?<={BEGIN}).*(?={END})", re.DOTALL)
COLORS = {"adamw": "0.45", "galore": "tab:blue"}


# -- from lines to numbers -------------------------------------------------------------------------


def grouped(lines: Sequence[Line]) -> Runs:
    """Methods in the order of their table, learning rates ascending."""
    runs: Runs = {}
    for name in METHODS:
        for line in sorted(lines, key=lambda line: (line["lr"], line["seed"])):
            if line["method"] == name:
                runs.setdefault(name, {}).setdefault(line["lr"], []).append(line)
    return runs


def perplexity(lines: Sequence[Line]) -> float:
    """Of the mean validation loss of all seeds; infinite where one of them diverged."""
    losses = [line["validation_loss"] for line in lines]
    return float("inf") if None in losses else exp(fmean(losses))


def best(by_lr: dict[float, list[Line]]) -> float:
    """The learning rate with the lowest mean validation loss over the seeds that all learning rates were tried with."""
    common = set.intersection(*({line["seed"] for line in lines} for lines in by_lr.values()))
    return min(by_lr, key=lambda lr: perplexity([line for line in by_lr[lr] if line["seed"] in common]))


def smoothed(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of the last `window` steps, from the first full window on."""
    return [fmean(losses[i - window : i]) for i in range(window, len(losses) + 1)]


def difficulty(lines: Sequence[Line]) -> dict[int, list[float]]:
    """By seed: the median loss of all runs in each step. All of them see the same batch, and this is its share."""
    seeds = {line["seed"] for line in lines}
    losses = {seed: [line["train_loss"] for line in lines if line["seed"] == seed] for seed in seeds}
    return {
        seed: [median(run[i] for run in runs if i < len(run)) for i in range(max(map(len, runs)))]
        for seed, runs in losses.items()
    }


def spikes(line: Line, usual: Mapping[int, Sequence[float]]) -> tuple[int, float]:
    """How often the training loss, less the batch's difficulty, rises by more than `SPIKE.rise` within
    `SPIKE.steps` steps after warm-up, as means of `SPIKE.window` steps; a spike ends when half of the rise is gone.
    Second: the highest such rise. A run that diverged has one spike more."""
    above = [loss - at for loss, at in zip(line["train_loss"], usual[line["seed"]], strict=False)]
    curve = smoothed(above[line["settings"]["warmup"] :], SPIKE.window)
    rises = [value - min(curve[max(0, i - SPIKE.steps) : i + 1]) for i, value in enumerate(curve)]
    count, inside = 0, False
    for rise in rises:
        count += rise > SPIKE.rise and not inside
        inside = rise > (SPIKE.rise / 2 if inside else SPIKE.rise)
    return count + (line["diverged"] is not None), max(rises, default=0.0)


def predicted(settings: Settings) -> dict[str, tuple[int, int]]:
    """Bytes of weights and of optimizer state that galore_mem expects, by method."""
    setup = galore_mem.Setup(
        recipe=recipe("fp32"), batch_size=settings.batch_size, seq_len=settings.seq_len, device="cpu"
    )
    names = dict.fromkeys(method.ledger for method in METHODS.values())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        config = Path(folder) / "config.json"
        config.write_text(settings.config().to_json_string(), encoding="utf-8")
        result = galore_mem.estimate(str(config), names, setup=setup, rank=settings.low_rank.rank)
    found = {e.method: (e.weights_bytes, e.optimizer_state_bytes) for e in result.estimates}
    return {name: found[method.ledger] for name, method in METHODS.items()}


# -- tables ----------------------------------------------------------------------------------------


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns after the first are right-aligned."""
    columns = head.split(" | ")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def number(value: float) -> str:
    return "diverged" if value == float("inf") else f"{value:.2f}"


def results(runs: Runs, settings: Settings) -> str:
    """The shape of GaLore-mini's table 2."""
    expected = predicted(settings)
    rows = []
    for name, by_lr in runs.items():
        lr = best(by_lr)
        lines = by_lr[lr]
        (weights,), (state,) = ({line[key] for line in lines} for key in ("weight_bytes", "state_bytes"))
        edge = "" if min(by_lr) < lr < max(by_lr) else " (edge)"
        seeds = ", ".join(number(perplexity([line])) for line in lines)
        sizes = (f"{n:,}" for n in (state, expected[name][1], weights, expected[name][0], lines[0]["trainable"]))
        rows.append([METHODS[name].title, number(perplexity(lines)), seeds, f"{lr:g}{edge}", *sizes])
    head = (
        "method | perplexity | by seed | learning rate | state, measured | predicted | weights, measured | predicted"
        " | trained parameters"
    )
    return table(head, rows)


def sweep(runs: Runs, usual: Mapping[int, Sequence[float]]) -> str:
    """Each cell: perplexity of the seeds, and the spikes of each."""
    rows = []
    for name, by_lr in runs.items():
        cells = []
        for lr in METHODS[name].learning_rates:
            lines = by_lr.get(lr, [])
            seen = [spikes(line, usual) for line in lines]
            rise = max((highest for _, highest in seen), default=0.0)
            counts = ", ".join(str(count) for count, _ in seen)
            cells.append(f"{lr:g}: {number(perplexity(lines))}; {counts}; +{rise:.2f}" if lines else f"{lr:g}: not run")
        rows.append([METHODS[name].title, *cells])
    return table("method | lowest learning rate | middle | highest", rows)


def spiking(runs: Runs, usual: Mapping[int, Sequence[float]]) -> str:
    """Which methods spike, and where."""
    said, calm = [], []
    for name, by_lr in runs.items():
        seen = {lr: [spikes(line, usual)[0] > 0 for line in lines] for lr, lines in by_lr.items()}
        flat, chosen = [s for each in seen.values() for s in each], seen[best(by_lr)]
        if any(flat):
            said.append(
                f"{METHODS[name].title}: {sum(flat)} of {len(flat)} runs spike, "
                f"{sum(chosen)} of {len(chosen)} at its best learning rate."
            )
        else:
            calm.append(METHODS[name].title)
    return bullets([*said, f"No run spikes: {'; '.join(calm) or 'there is no such method'}."])


def bullets(said: Sequence[str]) -> str:
    return "\n".join(fill(f"- {line}", 118, subsequent_indent="  ", break_on_hyphens=False) for line in said)


def setting(lines: Sequence[Line], settings: Settings) -> str:
    """What was done, as a list."""
    corpus, low = lines[0]["corpus"], settings.low_rank
    versions = ", ".join(f"{name} {v}" for name, v in lines[-1]["versions"].items())
    parameters = next(line["trainable"] for line in lines if line["method"].startswith("adam"))
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    said = (
        f"{len(lines)} runs on one CPU thread each, the last on {max(line['finished'] for line in lines)[:10]}; "
        f"{versions}.",
        f"Model: LLaMA with {parameters:,} parameters (hidden size {settings.hidden_size}, MLP "
        f"{settings.intermediate_size}, {settings.num_hidden_layers} layers, {settings.num_attention_heads} heads; "
        "head not tied), float32, one token for each byte; weights start at standard deviation hidden size^-0.5.",
        f"Text: the Python standard library's sources, {corpus['train_bytes']:,} bytes to train on and, in other "
        f"files, {corpus['validation_bytes']:,} to validate on (hash `{corpus['digest']}`). By its frequency "
        f"alone a byte has {corpus['unigram_nats']:.2f} nats, a perplexity of {exp(corpus['unigram_nats']):.1f}.",
        f"Each run: {settings.steps} steps of {settings.batch_size} x {settings.seq_len} bytes; {settings.warmup} "
        f"steps of warm-up, then a cosine down to {settings.final_lr:g} of the learning rate; betas 0.9 and 0.999, no "
        f"weight decay, no clipping, no dropout. Seeds {seeds}; with the same seed every method sees the same batches.",
        f"Low-rank methods: rank {low.rank} in every matrix of attention and MLP, a new projector every "
        f"{low.update_proj_gap} steps, scale {low.scale:g}; LoRA's alpha {low.lora_alpha}; ReLoRA merges every "
        f"{low.merge_every} steps, {low.merge_warmup} steps of warm-up after each, without a full-rank start. "
        "Embeddings, norms and head are trained in full everywhere.",
    )
    return bullets(said)


# -- the figure ------------------------------------------------------------------------------------


def figure(runs: Runs, path: Path) -> None:
    """GaLore-mini's figures 2 to 4: each approach beside AdamW and GaLore at its best learning rate, and, below, at
    every learning rate that was tried."""
    drawn, axes = plt.subplots(2, 3, figsize=(11, 6.2), sharex=True, sharey=True, layout="constrained")
    for column in range(3):
        name = f"galore-mini-{column + 1}"
        top, bottom = axes[0][column], axes[1][column]
        for shown, color in (*COLORS.items(), (name, "tab:orange")):
            if shown in runs:
                lr = best(runs[shown])
                curves(top, runs[shown][lr], color, f"{METHODS[shown].title}, {lr:g}")
        for lr, color in zip(sorted(runs.get(name, ())), ("#fdbe85", "#fd8d3c", "#a63603"), strict=False):
            curves(bottom, runs[name][lr], color, f"learning rate {lr:g}")
        top.set_title(f"Approach {column + 1} at its best learning rate", fontsize=10)
        bottom.set_title(f"Approach {column + 1} at all learning rates", fontsize=10)
        bottom.set_xlabel("step")
        for ax in (top, bottom):
            if ax.lines:
                ax.legend(fontsize=8, frameon=False)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylim(top=3.5)  # the first steps are alike
    for ax in axes[:, 0]:
        ax.set_ylabel(f"training loss, mean of {WINDOW} steps\n(nats per byte)")
    drawn.savefig(path, dpi=100)
    plt.close(drawn)


def curves(ax: Any, lines: Sequence[Line], color: str, label: str) -> None:
    """One curve for each seed, the first one with the label."""
    for i, line in enumerate(lines):
        curve = smoothed(line["train_loss"])
        steps = range(WINDOW, WINDOW + len(curve))
        ax.plot(steps, curve, color=color, linewidth=1.2, alpha=1 if i == 0 else 0.55, label=None if i else label)


# -- the document ----------------------------------------------------------------------------------


def write(lines: Sequence[Line], settings: Settings, document: Path) -> None:
    """Prints the results, and puts them with the figure into the document, between the two marks that it has."""
    runs = grouped(lines)
    if not runs:
        print("the record has no runs")
        return
    usual = difficulty(lines)
    text = f"""
{setting(lines, settings)}

{results(runs, settings)}
`(edge)`: the best of the three learning rates is an outer one; a wider sweep could find a better one. Bytes are those
of the storages that the weights and, at its fullest, the optimizer's state keep alive.

![Loss curves]({document.stem}.png)

Figures 2 to 4 of the GaLore-mini paper, in this setting. The paler line of a color is the second seed.

At every learning rate that was tried: perplexity; number of spikes, by seed; highest rise.

{sweep(runs, usual)}
A spike: after warm-up the training loss, less the median loss of all runs on the same batch, rises by more than
{SPIKE.rise:g} nats per byte within {SPIKE.steps} steps (means of {SPIKE.window}); it ends when half of that is gone.

{spiking(runs, usual)}
"""
    print(text)
    old = document.read_text(encoding="utf-8") if document.exists() else f"# Training\n\n{BEGIN}{END}"
    document.write_text(RESULTS.sub(lambda _: text, old), encoding="utf-8")
    figure(runs, document.with_suffix(".png"))
