"""The Grafana dashboard shows every metric of the service, and asks for none that it has not."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from osd.evaluate import Agreement
from server import metrics
from tests.conftest import Service

DASHBOARD = json.loads((Path(__file__).parents[1] / "docker/grafana/demur.json").read_text())
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [target["expr"] for target in TARGETS]

OURS = re.compile(r"demur_[a-z_]+")
SELECTED = re.compile(r"((?:demur_|vllm:)[a-z_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
# A clause is written before its parentheses, so it is about the first metric after it.
CLAUSE = r"\b(?:by|without|on|ignoring|group_left|group_right) ?\(([^)]*)\)"
GROUPED = re.compile(CLAUSE + r"(?=.*?(demur_[a-z_]+))")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def series_of(family: Metric) -> set[str]:
    """The names that its samples have."""
    return {family.name + suffix for suffix in SUFFIXES.get(family.type, ("",))}


def defined() -> list[MetricWrapperBase]:
    """The metrics of the service."""
    return [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]


def labels_of() -> dict[str, set[str]]:
    """By the name of a series, the labels that it has when Prometheus has scraped it."""
    labels = {}
    for metric in defined():
        for family in metric.describe():
            for name in series_of(family):
                bucket = {"le"} if name.endswith("_bucket") else set()
                labels[name] = {"instance", *metric._labelnames} | bucket
    return labels


def words(clause: str) -> set[str]:
    return set(re.findall(r"\w+", clause))


async def exposed(service: Service) -> list[Metric]:
    """The service's own metrics as /metrics has them, with or without samples."""
    page = (await service.client.get("/metrics")).text
    return [
        family
        for family in text_string_to_metric_families(page)
        if family.name.startswith("demur_") and not family.name.endswith("_created")
    ]


def test_it_is_a_dashboard_for_any_prometheus() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("demur", "demur")
    assert DASHBOARD["schemaVersion"] >= 39
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for part in [*PANELS, *TARGETS, variables["instance"]]:
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_panel_says_what_it_shows() -> None:
    titles = [row["title"] for row in ROWS]
    assert titles == ["Service", "Uncertainty", "Online distillation", "Spool"]
    for panel in PANELS:
        assert panel["title"]
        assert re.fullmatch(r"Watch for [^\n]+\.", panel["description"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs, panel["title"]
        assert len(set(refs)) == len(refs), panel["title"]


def test_panels_have_their_own_ids_and_places() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        assert min(at["x"], at["y"], at["w"] - 1, at["h"] - 1) >= 0, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
    for one, other in itertools.combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or apart, (one["title"], other["title"])


async def test_every_metric_it_asks_for_is_exposed(service: Service) -> None:
    names = {name for family in await exposed(service) for name in series_of(family)}
    asked = {name for text in EXPRESSIONS for name in OURS.findall(text)}
    assert asked
    assert asked <= names, sorted(asked - names)


async def test_every_metric_has_a_panel(service: Service) -> None:
    asked = {name for text in EXPRESSIONS for name in OURS.findall(text)}
    families = await exposed(service)
    assert len(families) >= len(defined())
    missing = [family.name for family in families if not series_of(family) & asked]
    assert not missing, missing


def test_selectors_have_the_metrics_labels() -> None:
    labels = labels_of()
    for text in EXPRESSIONS:
        for name, selector in SELECTED.findall(text):
            assert 'instance=~"$instance"' in selector, f"{text} is of all instances"
            if name in labels:
                assert set(MATCHER.findall(selector)) <= labels[name], text


def test_groups_are_by_the_metrics_labels() -> None:
    labels = labels_of()
    for text in EXPRESSIONS:
        groups = GROUPED.findall(text)
        assert len(groups) == len(re.findall(CLAUSE, text)), text
        for clause, name in groups:
            assert words(clause) <= labels[name], text
            assert ("le" in words(clause)) == name.endswith("_bucket"), text


def test_legends_name_labels_that_are_left() -> None:
    for target in TARGETS:
        named = words(" ".join(re.findall(r"{{(.*?)}}", target["legendFormat"])))
        groups = [words(clause) for clause, _ in GROUPED.findall(target["expr"])]
        assert named == (groups[0] - {"le"} if groups else named & {"instance"}), target["expr"]


def test_what_is_measured_of_drafts_goes_by_its_name() -> None:
    text = "\n".join(EXPRESSIONS)
    assert set(re.findall(r'on="(\w+)"', text)) == {"traffic", "reference"}
    measures = set(re.findall(r'measure="(\w+)"', text))
    assert {"kl_mixture", "jsd", "reference", "rmse", "epistemic"} <= measures
    assert measures <= set(Agreement._fields)


def test_vllm_has_the_metrics_asked_of_it() -> None:
    asked = {name for text in EXPRESSIONS for name in re.findall(r"vllm:[a-z_]+", text)}
    assert asked
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    sources = (Path(spec.origin).parent / "v1/metrics").glob("*.py")
    source = "".join(file.read_text() for file in sources)
    assert not [name for name in asked if f'"{name.removesuffix("_total")}"' not in source]
