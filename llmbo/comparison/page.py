"""`comparison.html`: one file that needs nothing else. Pictures are SVG inside the page."""

import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from llmbo.comparison.schema import HELDOUT, BandPart, Comparison, SummaryPart, TestPart
from llmbo.comparison.statistics import FEWEST_SEEDS
from llmbo.display.console import decimals

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; } th:first-child, td:first-child { text-align: left; }
.best { font-weight: 700; } .ahead { color: #1a7f37; } .behind { color: #b42318; } small, .note { color: #57606a; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) {
body { background: #14171b; color: #e6e8eb; } svg { background: #fff; } th, td { border-color: #3a4048; }
.ahead { color: #57c27a; } .behind { color: #f08a80; } small, .note { color: #9aa4af; } }
"""
_LINES = ("-", "--", ":", "-.")
COLUMNS = {"hypervolume": "proxy", "heldout_hypervolume": "held-out", "heldout_accuracy_hypervolume": "held-out items"}
_TESTED = COLUMNS | {"log_kl": "proxy, KL at equal size", "heldout_log_kl": "held-out, KL at equal size"}


def page(result: Comparison) -> str:
    """The page of a comparison, finished or not."""
    seeds = f"{len(result.seeds)} seed{'s' * (len(result.seeds) != 1)}"
    state = (
        ""
        if result.status == "complete"
        else " <strong>Not finished: strategies that lack a seed are left out of means.</strong>"
    )
    judged = {COLUMNS[metric]: result.judged[name] for metric, name in HELDOUT.items() if name in result.judged}
    volumes = [f"{where} of {_axes(axes)}" for where, axes in {"proxy": result.objectives, **judged}.items()]
    parts = [
        f"<h1>{html.escape(result.name)}</h1>",
        f'<p class="note">{html.escape(_facts(result))}. {seeds}; hypervolume, larger is better: {html.escape("; ".join(volumes))}. '
        "Intervals are 95 % of the mean, Student's t over the optimiser's seeds: text, windows and model are the same under "
        f"every seed, so they say nothing of other ones.{state}</p>",
        "<h2>Summary</h2>",
        _summary_table(result),
        "<h2>Hypervolume by evaluations</h2>",
        _figure(
            lambda axes: _traces(result, axes), "Hypervolume after each evaluation, mean over seeds with its interval"
        ),
        "<h2>Hypervolume by seconds</h2>",
        _figure(lambda axes: _seconds(result, axes), "Hypervolume by seconds of proposing and evaluating, every seed"),
        f"<h2>{html.escape(result.method)} against the others, seed by seed</h2>",
        '<p class="note">Mean difference with the interval of the paired differences, seeds won, and the two-sided Wilcoxon '
        f"signed-rank p (not below {2 ** (1 - len(result.seeds)):.2g} with {seeds}). "
        f"With fewer than {FEWEST_SEEDS} seeds nothing is called ahead or behind. KL at equal size: how much less or more of it, from the "
        f"dense model, {html.escape(result.method)} has than the other, geometric mean over sizes of the best "
        "model that fits; below 0 is in its favour.</p>",
        _test_table(result),
        "<h2>Evaluations needed to reach each other's final hypervolume</h2>",
        '<p class="note">Row: who searches. Column: whose mean hypervolume at the end is to be reached. – : not within the budget.</p>',
        _reach_table(result),
        "<h2>Union front</h2>",
        _figure(lambda axes: _front(result, axes), "Points that no trial of any strategy dominates"),
        _union_table(result),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(result.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )


def _axes(objectives: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{o['name']} (reference {o['reference']:.4g})" for o in objectives)


def _facts(result: Comparison) -> str:
    facts = result.facts
    tokens = facts.get("tokens") or {}
    counts = ", ".join(f"{count} {split}" for split, count in tokens.items())
    return f"{facts.get('model', '')}; {facts.get('text', '')}" + (f" ({counts} tokens)" if counts else "")


def _summary_table(result: Comparison) -> str:
    columns = [(evaluations, metric) for metric in COLUMNS for evaluations in result.checkpoints]
    columns = [c for c in columns if any(s.checkpoints[c[0]][c[1]] for s in result.summaries)]
    last = result.checkpoints[-1]
    heads = ["strategy", *(f"{COLUMNS[metric]}, {evaluations}" for evaluations, metric in columns)]
    heads += ["gain", "held-out gain", "s per proposal", "s in all"]

    def measured(summary: SummaryPart, evaluations: int, metric: str) -> BandPart | None:
        return summary.checkpoints[evaluations][metric] if summary.comparable or metric != "hypervolume" else None

    best = {c: max((b.mean for s in result.summaries if (b := measured(s, *c))), default=0.0) for c in columns}
    ordered = sorted(result.summaries, key=lambda s: -_rank(s, last))
    rows = []
    for summary in ordered:
        cells = [html.escape(summary.label)]
        for column in columns:
            found = measured(summary, *column)
            mark = ' class="best"' if found and found.mean >= best[column] else ""
            cells.append(f"<span{mark}>{_band(found)}</span>")
        cells += [_band(summary.checkpoints[last][metric]) for metric in ("gain", "heldout_gain")]
        cells += [f"{summary.median_proposal_seconds:.2f}", f"{summary.seconds.mean:.0f}"]
        rows.append(cells)
    return _table(heads, rows)


def _rank(summary: SummaryPart, evaluations: int) -> float:
    found = summary.checkpoints[evaluations]["heldout_hypervolume"] or summary.checkpoints[evaluations]["hypervolume"]
    return found.mean if found else 0.0


def _test_table(result: Comparison) -> str:
    rows = []
    for test in result.tests:
        p = "–" if test.p is None else f"{test.p:.3f}"
        verdict = f" {test.verdict}" if test.verdict else ""
        mean, interval = _difference(test)
        shown = f'<span class="{test.verdict}">{mean}{verdict}</span>{interval}'
        where = [html.escape(test.label), _TESTED[test.metric], str(test.evaluations)]
        rows.append([*where, shown, f"{test.wins}/{test.seeds}", p])
    return _table(["against", "windows", "evaluations", "difference", "won", "p"], rows)


def _difference(test: TestPart) -> tuple[str, str]:
    """Its mean and its interval; of log KL as a change of KL."""
    band = test.difference
    if test.metric in COLUMNS:
        signed = partial(decimals, sign="+")
        return signed(band.mean), _interval(band, " … ", signed)
    turned = BandPart(mean=band.mean, low=band.high, high=band.low)  # the more it is in favour, the less KL
    return kl_change(turned.mean), _interval(turned, " … ", kl_change)


def kl_change(difference: float) -> str:
    """How much less or more KL, in percent, a difference of log KL in someone's favour is."""
    return f"{100 * math.expm1(-difference) + 0.0:+.1f} %"


def _reach_table(result: Comparison) -> str:
    labels = list(dict.fromkeys(reach.label for reach in result.reach))
    found = {(reach.label, reach.baseline): reach.evaluations for reach in result.reach}
    rows = [
        [html.escape(label), *("" if label == other else str(found[label, other] or "–") for other in labels)]
        for label in labels
    ]
    return _table(["", *map(html.escape, labels)], rows)


def _union_table(result: Comparison) -> str:
    names = [objective["name"] for objective in result.objectives]
    qualities = list(result.judged) or ["loss"]
    rows = [
        [
            f"<code>{point.digest}</code>",
            *(f"{point.values[name]:.4g}" for name in names),
            *(f"{point.heldout[quality]:.3f}" if point.heldout else "–" for quality in qualities),
            html.escape(", ".join(point.found_by)),
        ]
        for point in result.union_front
    ]
    counts = {
        label: sum(label in point.found_by for point in result.union_front)
        for label in {arm.label for arm in result.arms}
    }
    share = ", ".join(
        f"{html.escape(label)} {count}" for label, count in sorted(counts.items(), key=lambda c: -c[1]) if count
    )
    table = _table(["architecture", *names, *(f"held-out {quality}" for quality in qualities), "found by"], rows)
    return f"<p>{len(rows)} points, found by: {share}.</p><details><summary>All points</summary>{table}</details>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _band(band: BandPart | None) -> str:
    if band is None:
        return "–"
    return f"{decimals(band.mean)}{_interval(band, '…')}"


def _interval(band: BandPart, between: str, told: Callable[[float], str] = decimals) -> str:
    """Nothing where there is none, or it has no width."""
    if band.low is None or band.high is None or band.low == band.high:
        return ""
    return f" <small>{told(band.low)}{between}{told(band.high)}</small>"


def _figure(draw: Callable[[Any], None], caption: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "llmbo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption class='note'>{html.escape(caption)}</figcaption></figure>"


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    from matplotlib import colormaps

    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    return {
        label: {"color": colors[index % 10], "ls": _LINES[index // 10 % len(_LINES)]}
        for index, label in enumerate(labels)
    }


def _traces(result: Comparison, axes: Any) -> None:
    shown = [summary for summary in result.summaries if summary.comparable]
    styles = _styles([summary.label for summary in shown])
    for summary in shown:
        steps = np.arange(1, len(summary.trace) + 1)
        axes.plot(steps, [b.mean for b in summary.trace], label=summary.label, lw=1.6, **styles[summary.label])
        ends = [[getattr(b, end) for b in summary.trace] for end in ("low", "high")]
        if None not in ends[0]:
            axes.fill_between(steps, *ends, color=styles[summary.label]["color"], alpha=0.15, lw=0)
    _finish(axes, "evaluations", "hypervolume, proxy windows", result)


def _seconds(result: Comparison, axes: Any) -> None:
    labels = [summary.label for summary in result.summaries if summary.comparable]
    styles = _styles(labels)
    for label in labels:
        for index, arm in enumerate(arm for arm in result.arms if arm.label == label):
            axes.step(
                arm.seconds, arm.trace, where="post", lw=0.9, label=label if index == 0 else None, **styles[label]
            )
    axes.set_xscale("log")
    _finish(axes, "seconds", "hypervolume, proxy windows", result)


def _front(result: Comparison, axes: Any) -> None:
    size, quality = (
        (next(o for o in result.objectives if o["known"] is known) for known in (True, False))
        if result.objectives
        else ({}, {})
    )
    if not result.union_front:
        return
    x, y = ([point.values[o["name"]] for point in result.union_front] for o in (size, quality))
    axes.step(x, y, where="post", color="#57606a", lw=0.8)
    styles = _styles([arm.label for arm in result.arms if arm.seed == result.seeds[0]])
    for label, style in styles.items():
        points = [point.values for point in result.union_front if label in point.found_by]
        if points:
            axes.plot(
                [p[size["name"]] for p in points],
                [p[quality["name"]] for p in points],
                "o",
                ms=4,
                alpha=0.7,
                label=label,
                color=style["color"],
            )
    axes.set(xlabel=size["name"], ylabel=f"{quality['name']} ({quality['unit']})")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _finish(axes: Any, x: str, y: str, result: Comparison) -> None:
    finals = [summary.trace[-1].mean for summary in result.summaries if summary.comparable]
    if finals and max(finals) > 0:
        axes.set_ylim(
            bottom=max(0.0, 0.6 * max(finals)),
            top=1.02 * max(b.high or b.mean for s in result.summaries if s.comparable for b in s.trace[-1:]),
        )
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:  # none where arms have problems of their own
        axes.legend(fontsize=8, ncols=2)
