"""The report of an evaluation: its page and its JSON, from made-up findings."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from demur.evals import _figures, _reading
from demur.evals._families import FAMILIES
from demur.evals.report import write_report

NASTY = "</script><b>&amp;\"' {{ 7 * 6 }} {% raw %} $x$ \x1b[2J 🎉 العربية \ud83d"
LISTS = ("runs", "tasks", "disagreements", "tables", "paired", "curves", "localisation", "goals")
VOID = ("meta", "br")


def estimate(value: float | None, spread: float = 0.02) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - spread, "high": value + spread}


def row(
    detector: str, family: str, auroc: float | None, cost: float | None = 0.0
) -> dict[str, Any]:
    others = ("auroc_within", "auroc_length_matched", "auprc", "acc_star", "prr", "aurac")
    found = {"detector": detector, "family": family, "auroc": estimate(auroc), "cost": cost}
    return found | {name: estimate(0.123) for name in others}


def table(rows: list[dict[str, Any]], half: str = "test", title: str = "facts") -> dict[str, Any]:
    return {"title": title, "note": NASTY, "n": 1200, "wrong": 700, "half": half, "rows": rows}


def example(texts: list[str], jsd: list[float], name: str = "facts/1") -> dict[str, Any]:
    n = len(texts)
    tokens = {"text": texts, "logprob": [-0.5] * n, "entropy": [0.3] * n, "total": [1.0] * n}
    tokens |= {"jsd": jsd, "kl": [0.0] * n}
    about = {"id": name, "task": "facts", "prompt": NASTY, "accepted": [NASTY], "extracted": None}
    return about | {"score": 0.4, "measure": "epistemic", "tokens": tokens}


def nothing() -> dict[str, Any]:
    return {
        "format": 1,
        "made": "2025-11-23T01:40:00+00:00",
        "demur": "0.1.0",
        "commit": None,
        "commands": [],
        "environment": {},
        "chosen": None,
        "calibration": None,
        "examples": {"doubted_right": [], "undoubted_wrong": []},
    } | {name: [] for name in LISTS}


def much() -> dict[str, Any]:
    """Something of everything, the nastiest text wherever there is one."""
    rows = [row(f"{family} <{i}>", family, 0.6 + i / 100, i) for i, family in enumerate(FAMILIES)]
    rows += [row(f"entropy {i}", "target", 0.58 - i / 100) for i in range(20)]
    rows += [row("length $1 & $2", "baseline", 0.2, None), row("constant", "baseline", None)]
    rows[3]["auprc"] = estimate(None)
    curves = [
        {
            "detector": f"{NASTY} {i}",
            "family": "demur",
            "roc": {"fpr": [0.0, 0.5, 1.0], "tpr": [0.0, math.nan, 1.0]},
            "risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.2, 0.4]},
        }
        for i in range(7)
    ]
    disagreement = {"id": NASTY, "prompt": NASTY, "response": NASTY, "accepted": [NASTY]}
    return nothing() | {
        "commit": "f9165ed",
        "commands": [f"demur eval facts # {NASTY}"],
        "environment": {"python": "3.11", "cores": 2, NASTY: NASTY},
        "runs": [
            {"folder": NASTY, "set": "facts", "mode": "generate", "model": NASTY}
            | {"weights_version": NASTY, "drafts": 4, "asking": {"samples": 5, "max_tokens": None}}
            | {"questions": 1220, "refused": 2, "seconds": 4321.5, "tokens": 81234}
        ],
        "tasks": [
            {"task": NASTY, "mode": "generate", "n": 1200, "wrong": 700, "mean_tokens": 12.3}
            | {"accuracy": estimate(0.417), "verdict": verdict, "strict": None}
            | {"flexible": 0.5, "label_disagreements": 3}
            for verdict in ("can be judged", "too hard")
        ],
        "disagreements": [
            disagreement | {"strict": strict, "flexible": True, "label": False}
            for strict in (None, True)
        ],
        "tables": [table(rows, "dev"), table(rows, "test", NASTY), table([])],
        "paired": [
            {"title": NASTY, "detector": "jsd", "rival": NASTY, "difference": difference}
            for difference in (estimate(0.1), estimate(-0.1), estimate(0.01), estimate(None))
        ],
        "chosen": {"statistic": "demur <0>", "how": NASTY},
        "calibration": {"title": NASTY, "ids": [NASTY], "ece": estimate(0.05)}
        | {"brier": estimate(0.2), "auroc": estimate(math.nan)}
        | {"reliability": [{"probability": 0.25, "wrong": 0.375, "count": 1234}]},
        "curves": [{"title": NASTY, "n": 1200, "detectors": curves}],
        "localisation": [
            {"title": NASTY, "n": 70, "note": NASTY}
            | {
                "rows": [
                    {"measure": "jsd", "hit": estimate(0.62), "auroc": estimate(None)}
                    | {"chance": 0.31}
                ]
            }
        ],
        "goals": [
            {"name": NASTY, "value": 0.7123, "bound": "at least 0.7", "holds": True},
            {"name": "ECE", "value": None, "bound": 0.05, "holds": False},
        ],
        "examples": {
            "doubted_right": [example([NASTY, "\n", "", "b"], [0.0, 0.15, 0.6, 0.6])],
            "undoubted_wrong": [example(["c"], [0.15], NASTY), example([], [])],
        },
    }


class Page(HTMLParser):
    """A page's elements and texts, as a browser's parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.problems: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        self.problems += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and "svg" not in self.open:
            self.problems.append(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def text(self, *tags: str) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag in tags).split())


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = write_report(much(), tmp_path_factory.mktemp("reports") / "new" / "report")
    assert file.name == "report.html"
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_is_whole_and_needs_nothing_else(html: str, page: Page) -> None:
    assert html.startswith("<!DOCTYPE html>")
    assert page.problems == []
    assert page.tags("html") == [{"lang": "en"}]
    for tag in ("script", "link", "img", "iframe", "b"):
        assert len(page.tags(tag)) == (1 if tag == "b" else 0)  # the chosen statistic
    assert not re.search(r"https?:|@import|\bsrc=", html)
    for reference in re.findall(r'(?:href=|url\()"?([^")]*)', html):
        assert reference.startswith("#"), reference
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [found["aria-labelledby"] for _, found in page.elements if "aria-labelledby" in found]
    references = re.findall(r'(?:href="|url\()#([^")]*)', html)
    assert set(labels + references) <= set(ids)
    for expected in ("prefers-color-scheme", "width=device-width", "@media print"):
        assert expected in html


def test_no_text_of_the_data_is_markup(html: str, page: Page) -> None:
    shown = NASTY.replace("\x1b", "␛").replace("\ud83d", "?")
    assert sum(data.count(shown) for _, data in page.texts) >= 40
    assert "<b>&" not in html
    assert "</script>" not in html


def test_every_detector_is_there_once_a_table(page: Page) -> None:
    heads = [data for tag, data in page.texts if tag == "th"]
    for found in much()["tables"][0]["rows"]:
        assert heads.count(" " + found["detector"]) == 2, found["detector"]
    # In the figures as well, as text; a wrapped name in several lines.
    figures = page.text("text")
    for name in ("demur <0>", "length $1 & $2", "constant", "AUROC"):
        assert name in figures


def test_tables_and_figures_are_named(page: Page) -> None:
    assert {cell.get("scope") for cell in page.tags("th")} == {"col", "row"}
    boxes = [found for found in page.tags("div") if found.get("class") == "wide"]
    assert len(boxes) == len(page.tags("table")) == len(page.tags("caption"))
    for box in boxes:
        assert (box["role"], box["tabindex"]) == ("region", "0")
    figures = [found for found in page.tags("svg") if found.get("role") == "img"]
    assert len(figures) == len(page.tags("figure")) == len(page.tags("figcaption"))
    assert all(figure["aria-label"] for figure in figures)
    others = [found for found in page.tags("svg") if found.get("role") != "img"]
    assert {found["aria-hidden"] for found in others} == {"true"}


def test_what_the_numbers_say(page: Page) -> None:
    everything = " ".join(" ".join(data for _, data in page.texts).split())
    for expected in (
        "2,400 answers were labelled, 1,400 of them wrong",
        "could be judged on 1 of these",
        "1 of 2 goals met",
        "✓ met",
        "✗ missed",
        "0.712",
        "41.7%",
        "−0.100",
        "1 h 12 min",
        "12 more detectors",
        "strict filter: right; flexible filter: right; label: wrong",
        "samples 5, max_tokens –",
    ):
        assert expected in everything, expected
    words = [data for tag, data in page.texts if tag == "td"]
    assert [word for word in words if word in ("better", "worse", "not told apart")] == [
        "better",
        "worse",
        "not told apart",
    ]
    assert not re.search(r"\b(nan|None)\b", everything)


def test_answers_are_shaded_on_one_scale(page: Page) -> None:
    classes = [found.get("class") or "" for found in page.tags("span")]
    tokens = [shade for shade in classes if re.fullmatch(r"t s\d", shade)]
    # jsd 0, 0.15, 0.6 (with what holds the first of its bytes) and 0.15 in the other answer.
    assert tokens == ["t s0", "t s1", "t s5", "t s1"]
    assert classes.count("t swatch s5") == 2


def test_json_is_what_was_found(tmp_path: Path) -> None:
    found = much()
    write_report(found, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "format": 1,')
    read = json.loads(text)
    found["calibration"]["auroc"] = estimate(None)  # JSON has no NaN
    for detector in found["curves"][0]["detectors"]:
        detector["roc"]["tpr"][1] = None
    assert read == found
    again = write_report(read, tmp_path / "again").read_bytes()
    assert again == (tmp_path / "report.html").read_bytes()


def test_a_report_of_nothing(tmp_path: Path) -> None:
    page = Page(write_report(nothing(), tmp_path).read_text(encoding="utf-8"))
    assert page.problems == []
    assert page.text("p").count("Nothing of this kind was measured.") == 13
    assert "There is nothing yet to judge the detectors by." in page.text("p")


def test_long_tables_keep_the_best_and_what_must_be_beaten() -> None:
    rows = _reading.by_auroc(much()["tables"][0]["rows"])
    values = [found["auroc"]["value"] for found in rows]
    assert values[:2] == pytest.approx([0.66, 0.65])
    assert values[-2:] == [0.2, None]
    shown, rest = _reading.in_view(rows)
    assert shown[:15] == rows[:15]
    assert [found["family"] for found in shown[15:]] == ["baseline", "baseline"]
    assert len(shown) + len(rest) == len(rows)
    late = [*(row(f"kl {i}", "demur", 0.9) for i in range(20)), row("TokUR", "tokur", 0.1)]
    shown, rest = _reading.in_view(late)
    assert (len(shown), shown[-1]["detector"], len(rest)) == (16, "TokUR", 5)


@pytest.mark.parametrize(
    "rows, chosen, verdict",
    [
        ([], None, "nothing yet"),
        ([row("jsd", "demur", None)], None, "nothing yet"),
        ([row("jsd", "demur", 0.51)], None, "No detector is shown"),
        ([row("p", "calibrated", 0.7), row("h", "target", 0.6)], None, "finds .* no detector of"),
        ([row("jsd", "demur", 0.6), row("h", "target", 0.7)], None, "finds .* h comes before it"),
        (
            [row("jsd", "demur", 0.5), row("h", "target", 0.7)],
            None,
            "is not shown to find .* h comes",
        ),
        (
            [row("jsd", "demur", 0.8), row("kl", "demur", 0.6), row("h", "target", 0.7)],
            "kl",
            "h comes",
        ),
        ([row("h", "target", 0.7)], None, "demur has no detector"),
    ],
)
def test_the_verdict(rows: list[dict[str, Any]], chosen: str | None, verdict: str) -> None:
    found = nothing() | {"tables": [table([row("x", "rival", 0.99)], "dev"), table(rows)]}
    if chosen:
        found["chosen"] = {"statistic": chosen, "how": ""}
    said = _reading.headline(found)
    assert re.search(verdict, said.verdict), said.verdict
    assert said.table is found["tables"][1]


def test_what_costs_the_same_has_one_place_a_family() -> None:
    rows = [row("a", "demur", 0.6, 0.5), row("b", "demur", 0.7, 0.5), row("c", "target", 0.6, 0)]
    rows += [row("d", "demur", 0.1, 2), row("e", "rival", None, 2), row("f", "rival", 0.9, None)]
    best = _reading.best_at_each_cost(rows)
    assert [found["detector"] for found in best] == ["c", "b", "d"]
    assert _figures.costs(best).axes[0].get_xlabel() == "added forward passes"


def test_lines_of_a_family_differ() -> None:
    families = ["demur", "target", "demur", "demur"]
    dashes = _figures.dashes_of([{"family": family} for family in families])
    assert dashes[0] == dashes[1] == ()
    assert len(set(dashes)) == 3


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_colours_can_be_seen_on_light_and_dark_pages(html: str) -> None:
    roots = re.findall(r":root \{([^}]*)\}", html)
    assert len(roots) == 2
    for root in roots:
        colors = dict(re.findall(r"--(\w+): (#\w{6})", root))
        assert set(FAMILIES) <= set(colors)
        for name, least in [
            *((family, 3.0) for family in FAMILIES),
            ("ink", 7.0),
            ("good", 4.5),
            ("bad", 4.5),
        ]:
            low, high = sorted((luminance(colors[name]), luminance(colors["paper"])))
            assert (high + 0.05) / (low + 0.05) >= least, name
    assert "#0101" not in html  # all of matplotlib's colours have become the page's
