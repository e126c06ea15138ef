"""The page of all metrics, ``docs/metrics.md``, written from the families themselves by `engine.reference`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from engine.metric_families import Families

_SAMPLES = {"counter": "_total", "info": "_info"}

_HEAD = """\
# Metrics

<!-- Written by `python -m engine.reference`; edit engine/metric_families.py, not this page. -->

What `/metrics` exports, beside the figures of the process (`process_...`). Counters count what this process did.
Figures that are not known yet are NaN. A histogram has `_bucket`, `_sum` and `_count`, a summary the last two.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""


def metric_reference() -> str:
    """The whole page."""
    registry = CollectorRegistry()
    families = Families(registry)
    labels = {
        vars(family)["_name"]: vars(family)["_labelnames"]
        for family in vars(families).values()
        if "_labelnames" in vars(family)
    }
    lines = []
    for family in sorted(registry.collect(), key=lambda each: each.name):
        if family.name.startswith("adaptd_"):
            named = ", ".join(f"`{label}`" for label in labels.get(family.name, ()))
            name = f"{family.name}{_SAMPLES.get(family.type, '')}"
            lines.append(f"| `{name}` | {family.type} | {named} | {family.documentation} |\n")
    return _HEAD + "".join(lines)
