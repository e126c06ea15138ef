import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.metrics import Metrics
from streams.codec import Events
from tests.engine.cores import events, feedback, make_core
from tests.engine.test_metrics import daemon_of

OPS = Path(__file__).parents[2] / "ops"
PROMETHEUS = OPS / "prometheus"
PROMTOOL = shutil.which("promtool")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OPS / "grafana" / "adaptd.json").read_text())
    return found


def expressions(node: object) -> Iterator[str]:
    """Every PromQL expression in a dashboard, wherever it is."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "definition"):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for item in node:
            yield from expressions(item)


def used(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:adaptd|process)_\w+", expression))


def exported() -> dict[str, tuple[str, ...]]:
    """Names of samples as they are scraped, with the names of their labels."""
    found: dict[str, tuple[str, ...]] = {}
    registry = Metrics().registry
    labels = {vars(family).get("_name"): vars(family).get("_labelnames", ()) for family in registry._collector_to_names}
    for family in registry.collect():
        own = tuple(labels.get(family.name, ()))
        for suffix in SUFFIXES.get(family.type, ("",)):
            found[family.name + suffix] = (*own, "le") if suffix == "_bucket" else own
        found |= {sample.name: tuple(sample.labels) for sample in family.samples if sample.name not in found}
    return found


def run(*arguments: str, stdin: bytes | None = None) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=PROMETHEUS, input=stdin, capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, ""), done.stdout.decode()


def test_alerts_and_dashboard_use_only_metrics_that_exist() -> None:
    found = [rule["expr"] for rule in rules()] + list(expressions(board()))
    assert len(found) > 60
    assert set().union(*map(used, found)) - exported().keys() == set()


def test_alerts_and_dashboard_select_only_labels_that_exist() -> None:
    labels = exported()
    for expression in (*[rule["expr"] for rule in rules()], *expressions(board())):
        for name, selector in re.findall(r"\b((?:adaptd|process)_\w+)\{([^}]*)\}", expression):
            selected = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector)) - {"instance", "job"}
            assert selected <= set(labels[name]), expression


def test_every_family_of_ours_is_on_the_dashboard_or_in_an_alert() -> None:
    shown = set().union(*map(used, [*expressions(board()), *[rule["expr"] for rule in rules()]]))
    for name in exported():
        family = re.sub(r"_(bucket|sum|count|created)$", "", name)
        if name.startswith("adaptd_") and not name.endswith("_created"):
            assert any(found.startswith(family) for found in shown), name


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    named = {rule["alert"]: rule["annotations"]["runbook"] for rule in rules()}
    assert {name: f"ops/runbooks/{name}.md" for name in named} == named
    assert {path.stem for path in (OPS / "runbooks").glob("*.md")} == named.keys()
    for name in named:
        text = (OPS / "runbooks" / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n"), name
        assert "## Look" in text, name
        assert "## Do" in text, name


def test_the_runbook_for_a_daemon_that_is_down_explains_every_exit_code() -> None:
    codes = re.findall(r"^\| ([\d, ]+) \|", (OPS.parent / "docs" / "guide.md").read_text(), re.MULTILINE)
    expected = set(re.findall(r"\d+", " ".join(codes))) - {"0", "2"}
    assert {"69", "70", "78", "143"} <= expected
    assert expected <= set(re.findall(r"\b\d+\b", (OPS / "runbooks" / "AdaptdDown.md").read_text()))


def test_every_alert_is_tested_to_fire_and_to_stay_quiet() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fires = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fires == {rule["alert"] for rule in rules()}
    for test in tests:
        # What fires is one of two instances, so the other one is the case that stays quiet.
        instances = set(re.findall(r'instance="([^"]+)"', " ".join(one["series"] for one in test["input_series"])))
        assert instances == {"bad:9464", "good:9464"}, test["name"]


def test_panels_of_the_dashboard_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


@promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    run("check", "config", "prometheus.yml")
    run("check", "rules", "alerts.yml")


@promtool
def test_every_alert_fires_where_it_should_and_nowhere_else() -> None:
    run("test", "rules", "alerts_test.yml")


@promtool
def test_promtool_finds_no_fault_with_the_exposition() -> None:
    metrics, core = Metrics(), make_core(audit_share=0.5)
    batch = events(0, 32)
    core.answer(batch)
    core.follow()
    core.feedback(feedback(0, 32))
    metrics.batch(Events.of(batch), 0.01, 0.01)
    metrics.watch(core)
    core.methods.adaptation.gauges["rows"] = 1
    core.counts["skipped.learning.nonfinite_loss"] = core.counts["decisions.hold.too_few"] = 1
    metrics.records_out("predictions", 1)
    metrics.look(daemon_of(core, lag={("data", 0): 1}))
    bare = {family.name for family in metrics.registry.collect() if not family.samples}
    assert bare == set(), "promtool sees no family without samples"
    run("check", "metrics", stdin=metrics.exposition())
