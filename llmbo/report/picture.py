"""A report -> the front as a picture for papers and READMEs, PNG or SVG."""

from io import BytesIO
from typing import Any

from llmbo.report.schema import Report

# Okabe and Ito's palette tells apart under every common colour blindness; shapes say the same to those who see none.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = "osD^v"


def draw_front(report: Report) -> dict[str, bytes]:
    """Every trial and the front, quality against size.

    Returns:
        The picture by file name: `front.png` at 150 dots per inch, and `front.svg` with its text as text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    _plot(report, figure.subplots())
    png = BytesIO()
    figure.savefig(png, dpi=150, format="png")
    figure.set_layout_engine(None)  # laid out it is by now, and to do so again takes as long as drawing it
    return {"front.png": png.getvalue(), "front.svg": as_svg(figure)}


def as_svg(figure: Any) -> bytes:
    """A matplotlib figure with its text as text; the same figure gives the same bytes."""
    import matplotlib

    svg = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmbo"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _plot(report: Report, axes: Any) -> None:
    size = next(objective for objective in report.objectives if objective.known)
    quality = next(objective for objective in report.objectives if not objective.known)

    def columns(values: list[Any]) -> tuple[list[float], list[float]]:
        x, y = ([getattr(value, name) for value in values] for name in (size.name, quality.name))
        return x, y

    by_origin: dict[str, list[Any]] = {}
    for trial in report.trials:
        if trial.objectives:
            by_origin.setdefault(trial.origin, []).append(trial.objectives)
    for index, (origin, values) in enumerate(sorted(by_origin.items())):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        label = _plain(f"{origin} ({len(values)})")
        axes.scatter(*columns(values), s=18, alpha=0.6, linewidths=0, label=label, **style)
    front = sorted((point.objectives for point in report.front), key=lambda values: getattr(values, size.name))
    if len(report.objectives) == 2:
        axes.step(*columns(front), where="post", color="black", lw=1.2, label="front, proxy windows")
    else:  # of a surface one sees two axes only
        axes.plot(*columns(front), "o", color="black", mfc="none", ms=6, label="front, proxy windows")
    judged = [(point.heldout, point.noise) for point in report.front if point.heldout]
    if judged:
        error = [getattr(noise, quality.name, 0.0) for _, noise in judged]
        x, y = columns([seen for seen, _ in judged])
        axes.errorbar(x, y, error, fmt="x", color="#D55E00", ms=5, lw=0.8, label="front, held-out windows")
    axes.plot(*columns([report.dense.objectives]), "*", color="black", ms=11, label="dense model")
    axes.set(xlabel=f"{size.name} ({size.unit})", ylabel=f"{quality.name} ({quality.unit})")
    axes.set_title(_plain(f"{report.model.name}: {len(report.trials)} trials"))
    if quality.direction == "minimize":
        axes.set_ylim(top=1.15 * quality.reference_point)
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    for constraint in report.constraints:  # what lies beyond a limit
        shade: dict[str, Any] = {"color": "gray", "alpha": 0.15, "lw": 0, "zorder": 0}
        if constraint.name == size.name and constraint.maximum < right:
            axes.axvspan(constraint.maximum, right, **shade)
        if constraint.name == quality.name and constraint.maximum < top:
            axes.axhspan(constraint.maximum, top, **shade)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _plain(text: str) -> str:
    """Names from outside are text, not matplotlib's mathematics."""
    return text.replace("$", r"\$")
