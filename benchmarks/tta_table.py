"""The table of `benchmarks.tta` as Markdown, and its short form in README.md.

    python -m benchmarks.tta_table [RESULT.json] [--check]

rewrites what stands between the two marks in README.md, and the .md beside the result. With ``--check`` nothing is
written, and the exit code tells whether README.md is what the result gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import DIRECTORY

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- adaptation table: begin -->", "<!-- adaptation table: end -->"

PASSES: dict[str, float] = {
    "none": 1,
    "bn": 1,
    "class_bn": 1,
    "lame": 1,
    "t3a": 1,
    "adanpc": 1,
    "foa": 1,
    "drm": 1,
    "per_group": 1,
    "tent": 2,
    "eta": 2,
    "eata": 2,
    "rdumb": 2,
    "graded": 2,
    "nhl": 2,
    "delta": 2,
    "deyo": 2.5,
    "sar": 4,
    "roid": 3,
    "cmf": 3,
    "mezo": 3,
    "rotta": 4,
    "note": 3,
    "sotta": 5,
    "petta": 8,
    "tribe": 6,
}
"""Passes over a batch, a backward to the normalisation layers counted as one; of chosen rows half, of a bank as many as
its interval. One divided by it is the speed if nothing else cost."""

SHORT = ("correlated", "iid", "recurring20", "mixed", "clean_iid", "elec")
"""Streams of the short table."""

BEST_KNOWN = ("none", "auto", "lame", "bn:alpha=1", "tent", "eata", "sar", "roid", "rotta", "cotta")
"""Methods of the short table."""

ENDS = ("worst regret", "speed", "floor", "memory")
"""Columns after those of the streams."""

Found = Mapping[str, Any]


def summary(results: Found, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each method: the worst regret and where, the speed, the floor of its passes, and memory."""
    return {method: _of(results, method) for method in methods}


def _of(results: Found, method: str) -> dict[str, Any]:
    regrets = {
        stream: round(row[method]["error_percent"] - row[method]["source_error_percent"], 2)
        for stream, row in results["cells"].items()
        if "error_percent" in row.get(method, {})
    }
    found: dict[str, Any] = {}
    if regrets:
        worst = max(regrets, key=lambda stream: regrets[stream])
        found |= {"worst_regret_points": regrets[worst], "worst_regret_on": worst, "streams": len(regrets)}
    passes = PASSES.get(method.partition(":")[0])
    found["floor_of_passes"] = round(1 / passes, 3) if passes else None
    for stream, row in results["speed"].items():
        one = row.get(method, {})
        if "share_of_plain_speed" in one:
            found.setdefault("share_of_plain_speed", {})[stream] = one["share_of_plain_speed"]
            found.setdefault("forwards_per_event", {})[stream] = one["forwards_per_event"]
            found["peak_mib_over_plain"] = max(
                found.get("peak_mib_over_plain", 0.0), one.get("peak_mib_over_plain", 0.0)
            )
    speed = found.get("share_of_plain_speed", {}).get("correlated")
    if speed is not None and passes:
        found["share_of_floor"] = round(speed * passes, 3)
    return found


def markdown(result: Found) -> str:
    """The whole table."""
    results = result["results"]
    machine = result["machine"]
    load = machine["load_before"][0], machine["load_after"][0]
    lines = [
        "# Adaptation methods on all streams",
        "",
        f"`{result['command']}`, {result['date']}, {machine['processor']}, load {load[0]} before and {load[1]} after.",
        "",
        *table(results, list(results["specs"])),
        "",
        LEGEND,
        "",
        *visits(results),
    ]
    if results["skipped"]:
        lines += ["", f"No time was left for: {', '.join(results['skipped'])}."]
    return "\n".join(lines) + "\n"


LEGEND = (
    "Error in percent of all rows, each answered before it is adapted to. Where a method is too dear for all images, "
    "the source model's error on the same fewer images follows in brackets; - where it cannot run. Regret: "
    "error minus the source model's, in points, on the stream where it is worst. Speed: images a second as a share of "
    "the plain forward's, alternating with it batch by batch on one thread, one method at a time; floor: what it would "
    "be if nothing but the method's passes over rows cost, and the share of it that is reached. Memory: MiB at the "
    "peak beyond the plain forward's."
)


SHORT_LEGEND = (
    "Error in percent of all rows, each answered before it is adapted to, without labels; where a method was given "
    "fewer images, the source model's error on the same ones follows in brackets. Regret: error minus the source "
    "model's, in points, on the stream where it is worst. Speed: images a second as a share of the plain forward's, on "
    "one thread."
)


def table(
    results: Found, streams: Sequence[str], methods: Sequence[str] | None = None, ends: Sequence[str] = ENDS
) -> list[str]:
    """Lines of the table with these streams, methods (by default all) and last columns."""
    present = [stream for stream in streams if stream in results["cells"]]
    heads = ["method", *present, *ends]
    full = {
        stream: max((cell.get("images", 0) for cell in results["cells"][stream].values()), default=0)
        for stream in present
    }
    lines = [_row(heads), _row(["---"] * len(heads))]
    lines.append(_row(["rows", *(f"{full[stream]:,}" for stream in present), *("" for _ in ends)]))
    for method, short in results["summary"].items():
        if methods is None or method in methods:
            cells = [_cell(results["cells"][stream].get(method, {}), full[stream]) for stream in present]
            last = _ends(short)
            lines.append(_row([f"`{method}`", *cells, *(last[end] for end in ends)]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(found: Found, full: int) -> str:
    if "error_percent" not in found:
        return "-" if "refused" in found else "no time"
    error = f"{found['error_percent']:.1f}"
    return error if found["images"] == full else f"{error} ({found['source_error_percent']:.1f})"


def _ends(short: Found) -> dict[str, str]:
    regret = "-"
    if "worst_regret_points" in short:
        regret = f"{short['worst_regret_points']:+.1f} ({short['worst_regret_on']})"
    shares = short.get("share_of_plain_speed", {})
    speed = ", ".join(f"{shares[s]:.2f}{'' if len(shares) == 1 else f' ({s})'}" for s in shares) or "-"
    floor = f"{short['floor_of_passes']:.2f}" if short["floor_of_passes"] else "-"
    if "share_of_floor" in short:
        floor += f" ({100 * short['share_of_floor']:.0f} %)"
    memory = f"{short['peak_mib_over_plain']:.0f}" if "peak_mib_over_plain" in short else "-"
    return dict(zip(ENDS, (regret, speed, floor, memory), strict=True))


def visits(results: Found) -> list[str]:
    """Lines on streams that came several times: error of the first and the last visit."""
    lines = []
    for stream, row in results["cells"].items():
        pairs = [
            f"`{method}` {cell['first_visit_percent']:.1f} to {cell['last_visit_percent']:.1f}"
            for method, cell in row.items()
            if "last_visit_percent" in cell
        ]
        if pairs:
            lines.append(f"First to last visit of {stream}: {', '.join(pairs)}.")
    return lines


def section(result: Found) -> str:
    """The short table for README.md, without the marks."""
    results = result["results"]
    lines = table(results, SHORT, BEST_KNOWN, ENDS[:2])
    auto = results["summary"].get("auto", {})
    if "worst_regret_points" in auto:
        count, worst = auto["streams"], auto["worst_regret_points"]
        lines += ["", f"`auto` is on none of {count} streams more than {worst:.1f} points worse than the source model."]
    recurring = results["cells"].get("recurring20", {}).get("auto", {})
    if "last_visit_percent" in recurring:
        first, last = recurring["first_visit_percent"], recurring["last_visit_percent"]
        lines += [
            "",
            f"`auto` on the stream that comes twenty times: {first:.1f} % on the first visit, {last:.1f} on the last.",
        ]
    count = len(results["summary"]), len(results["cells"])
    more = (
        f"{SHORT_LEGEND} All {count[0]} methods on all {count[1]} streams, with memory: "
        f"[tta.md](benchmarks/results/tta.md), from `{result['command']}`."
    )
    return "\n".join([*lines, "", more])


def replaced(readme: str, result: Found) -> str:
    """README.md with the short table of a result between its marks.

    Raises:
        ValueError: If the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} followed by {END}: put both where the table is to be")
    return f"{before}{BEGIN}\n\n{section(result)}\n\n{END}{after}"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("result", nargs="?", type=Path, default=DIRECTORY / "tta.json")
    made.add_argument("--check", action="store_true", help="write nothing; exit with 1 where README.md differs")
    options = made.parse_args()
    result = json.loads(options.result.read_text())
    readme = README.read_text()
    wanted = replaced(readme, result)
    if options.check:
        sys.exit(int(wanted != readme))
    README.write_text(wanted)
    options.result.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
