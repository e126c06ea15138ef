"""The demonstration's report: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.demo.stream import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from engine.demo.main import Outcome

WINDOW = 400
"""Events that a point of a curve is the mean of."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>adaptd demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.2rem }} .lead {{ font-size: 1.15rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .25rem .9rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} .gain {{ color: #116329 }} .loss {{ color: #a40e26 }}
svg {{ width: 100%; height: auto }}
</style></head><body>
<h1>adaptd demo</h1>
<p class="lead">{lead}</p>
{sections}
</body></html>
"""


def write_report(path: Path, outcome: Outcome) -> None:
    """Write the report with its pictures as SVG inside."""
    summary = outcome.summary()
    drifted, clean = summary["drifted"], summary["clean"]
    speed = summary["events_per_second"]
    pace = f" ({speed:,.0f} a second)" if speed is not None else ""
    lead = (
        f"{summary['events']:,} events in {summary['seconds']:.1f} s{pace}. "
        f"While the world had drifted the frozen model was right on {drifted['frozen']:.1%} of the events and the "
        f"adapted one on {drifted['adapted']:.1%}; on clean data {clean['frozen']:.1%} and {clean['adapted']:.1%}. "
        f"{summary['updates']:,} updates, {summary['releases']} releases."
    )
    sections = [
        _section(
            "Accuracy over time", "Mean of the last 400 events; the background shows the phases.", _accuracy(outcome)
        ),
        _section("By phase", "", _table(summary["phases"])),
        _section(
            "Drift",
            "Share of events on which the two models disagree, and mean confidence of the answers.",
            _drift(outcome),
        ),
        _section(
            "Flips",
            "Events that only the adapted model had right (positive), and that only the frozen one had (negative).",
            _flips(outcome),
        ),
        _section(
            "Updates and releases", "Updates applied to the live weights; a line marks each release.", _updates(outcome)
        ),
    ]
    page = _PAGE.format(lead=html.escape(lead), sections="\n".join(sections))
    scratch = path.with_suffix(".part")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(path)


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["<table><tr><th>phase<th>events<th>frozen<th>adapted<th>gain, points</tr>"]
    for row in rows:
        gain = 100 * (row["adapted"] - row["frozen"])
        kind = "gain" if gain >= 0 else "loss"
        lines.append(
            f"<tr><td>{html.escape(row['phase'])}<td>{row['events']}<td>{row['frozen']:.1%}<td>{row['adapted']:.1%}"
            f'<td class="{kind}">{gain:+.1f}</tr>'
        )
    return "".join([*lines, "</table>"])


def _rolling(values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of the last `WINDOW` values, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values.astype(np.float64)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - WINDOW)
    mean: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def _picture(outcome: Outcome, label: str, curves: dict[str, tuple[NDArray[Any], str]]) -> tuple[Any, Axes]:
    """Axes with the phases in the background and these curves, ``name -> (values, colour)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots()
    domain = outcome.stream.domain
    for number, name in enumerate(PHASES):
        rows = np.flatnonzero(domain == number)
        shade = "#f4f6f8" if name == "clean" else ("#fff3e0" if number % 2 else "#fde9d9")
        axes.axvspan(rows[0], rows[-1] + 1, color=shade, lw=0, zorder=0)
        axes.text(rows.mean(), 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    for name, (values, colour) in curves.items():
        step = max(1, len(values) // 1000)
        axes.plot(np.arange(len(values))[::step], values[::step], label=name, color=colour, lw=1.6)
    axes.set_xlim(0, len(domain))
    axes.set_xlabel("events")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, ncols=len(curves), loc="lower center")
    return figure, axes


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _accuracy(outcome: Outcome) -> str:
    y = outcome.stream.y
    curves = {
        "adapted": (_rolling(outcome.adapted == y), "#0969da"),
        "frozen": (_rolling(outcome.frozen == y), "#8b949e"),
    }
    figure, axes = _picture(outcome, "accuracy", curves)
    axes.set_ylim(0, 1.02)
    return _svg(figure)


def _drift(outcome: Outcome) -> str:
    curves = {
        "disagreement with the frozen model": (_rolling(outcome.adapted != outcome.frozen), "#bc4c00"),
        "confidence": (_rolling(outcome.confidence), "#1a7f37"),
    }
    figure, axes = _picture(outcome, "share", curves)
    axes.set_ylim(0, 1.02)
    return _svg(figure)


def _flips(outcome: Outcome) -> str:
    y = outcome.stream.y
    right, was = outcome.adapted == y, outcome.frozen == y
    curves = {
        "positive flips": (_rolling(right & ~was), "#1a7f37"),
        "negative flips": (_rolling(was & ~right), "#cf222e"),
    }
    return _svg(_picture(outcome, "share of events", curves)[0])


def _updates(outcome: Outcome) -> str:
    figure, axes = _picture(outcome, "updates", {"updates": (outcome.step, "#8250df")})
    for row in np.flatnonzero(np.diff(outcome.release) > 0):
        axes.axvline(float(row) + 1, color="#1b1f24", lw=1, ls=":")
    return _svg(figure)
