"""Heat maps in a terminal, in a notebook, as a page and in words."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
from demur import ChatCompletion, DemurError, HeatMap, Score
from demur._measures import MEASURES
from demur._shades import DARK, LIGHT, shade_of
from demur._visible import visible
from demur.heatmap import HeatToken
from rich.console import Console

TRICKY = [
    "</script><script>alert(1)</script>",
    "</style>",
    "</title>",
    "</span></div>",
    "\"'&amp;<!--",
    "\n\tdef f():\r\n\t    pass\n",
    "東京 🎉 العربية שלום",
    "[bold]no markup[/bold]",
    "{braces} $5 and $6 %s",
]


def score_of(texts: list[str], epistemic: list[float] | None = None, **changes: Any) -> Score:
    """A score whose tokens have these texts."""
    values = epistemic or [0.1 * (i + 1) for i in range(len(texts))]
    tokens, start = [], 0
    for text, value in zip(texts, values, strict=True):
        offset, start = (start, start + len(text)), start + len(text)
        tokens.append(
            {"token": text, "token_id": 1, "bytes": [], "text_offset": offset, "rank": 3}
            | {"logprob": -2 * value, "entropy": 0.5, "total": 1.0, "aleatoric": 0.9}
            | {"jsd": value / 4, "kl": value * 3 / 4, "epistemic": value}
        )
    sequence = {"n_tokens": len(texts), "epistemic_mean": 0.25, "epistemic_max": max(values)}
    sequence |= {"epistemic_sum": sum(values), "logprob_mean": -0.5, "logprob_min": -1.0}
    estimator = {"name": "epistemic", "drafts": 4, "weights_version": "w-1", "support": "full"}
    usage = {"prompt_tokens": 1, "completion_tokens": len(texts), "total_tokens": 1 + len(texts)}
    body = {"id": "score-1", "created": 1, "model": "tiny", "estimator": estimator, "usage": usage}
    body |= {"hallucination_score": None, "flagged": None, "threshold": None}
    return Score.model_validate(
        body | {"sequence": sequence, "tokens": tokens, "spans": []} | changes
    )


def chat_of(score: Score) -> ChatCompletion:
    """The same as an answer of the target's own."""
    entries = [
        {"token": token.token, "bytes": None, "logprob": token.logprob, "top_logprobs": []}
        | {"uncertainty": token.model_dump()}
        for token in score.tokens
    ]
    own = score.model_dump(include={"estimator", "hallucination_score", "sequence", "spans"})
    choice = {"index": 0, "message": {"content": score.text}, "logprobs": {"content": entries}}
    choice |= {"finish_reason": "stop", "uncertainty": own}
    return ChatCompletion.model_validate(
        {"id": "chat-1", "created": 1, "model": "tiny", "choices": [choice]}
    )


class Parsed(HTMLParser):
    """Elements, and the text of those of a class or id, as a browser's parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.problems: list[str] = []
        self.texts: dict[str, str] = {}
        self.shaded: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        self.problems += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        classes = (dict(attrs).get("class") or "").split()
        if "t" in classes:
            self.shaded.append((" ".join(classes), ""))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.texts[where] = self.texts.get(where, "") + data
        if where == "span" and self.shaded and self.elements[-1][1].get("tabindex"):
            self.shaded[-1] = (self.shaded[-1][0], self.shaded[-1][1] + data)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def shown(heatmap: HeatMap, **options: Any) -> str:
    out = StringIO()
    Console(file=out, width=200, force_terminal=True, **options).print(heatmap)
    return out.getvalue()


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("shades", [LIGHT, DARK])
def test_shades_are_one_ramp_and_readable(shades: tuple[tuple[str, str], ...]) -> None:
    for pair in shades:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
    ramp = [luminance(background) for background, _ in shades]
    assert ramp in (sorted(ramp), sorted(ramp, reverse=True))
    assert len(set(ramp)) == len(shades)


def test_the_pages_own_colours_are_readable() -> None:
    style = score_of(["a"]).to_html().split("<style>")[1].split("</style>")[0]
    pairs = re.findall(
        r"background:\s*(#\w{6});\s*color:\s*(#\w{6})", style.replace("#fff;", "#ffffff;")
    )
    assert len(pairs) >= 15
    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def test_shades_compare_by_top() -> None:
    assert [shade_of(value, 0.6) for value in (0, 0.09, 0.11, 0.55, 0.6, 9)] == [0, 0, 1, 5, 5, 5]
    assert shade_of(1, 0) == shade_of(-1, 1) == 0
    score = score_of(["a", "b"], [0.1, 0.2])
    assert score.heatmap().top == 0.2
    assert score.heatmap(measure="surprisal").top == 0.4
    assert "s5" in Parsed(score.to_html()).shaded[1][0]
    assert "s1" in Parsed(score.to_html(top=0.9)).shaded[1][0]
    with pytest.raises(ValueError, match="no measure; these are: epistemic, jsd"):
        score.heatmap(measure="doubt")  # type: ignore[arg-type]


def test_a_terminal_shows_text_shades_spans_and_numbers() -> None:
    span = {"start": 1, "end": 3, "text": "bc", "epistemic_mean": 1.0, "epistemic_max": 1.0}
    score = score_of(["a", "bc", "[bold]d[/bold]"], spans=[span])
    out = shown(score.heatmap(), color_system="truecolor")
    assert "48;2;128;0;38" in out  # the darkest shade: the most doubtful token
    assert re.search(r"\x1b\[4;[\d;]*mbc\x1b", out)
    plain = shown(score.heatmap(), color_system=None)
    for expected in ("abc[bold]d[/bold]", "highest epistemic", "doubtful: 'bc'", "0.250"):
        assert expected in plain
    assert "highest jsd" in shown(score.heatmap(measure="jsd"))


def test_shades_fit_a_terminal_of_256_colours() -> None:
    # In a process of its own: rich remembers how it wrote a style for the first console.
    check = (
        "from demur.heatmap import HeatMap, HeatToken; from rich.console import Console;"
        "heatmap = HeatMap([HeatToken('a', -1.0, 1, {'epistemic': 1.0})], spans=[],"
        "sequence={}, source='');"
        "Console(force_terminal=True, color_system='256').print(heatmap)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, check=True, text=True)
    assert "48;5;88" in done.stdout  # a dark red


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;" not in shown(score_of(["a"]).heatmap(), color_system="truecolor")


@pytest.mark.parametrize("kind", [score_of, lambda texts: chat_of(score_of(texts))])
def test_nothing_of_a_text_is_markup(kind: Any) -> None:
    answer = kind(TRICKY)
    page = Parsed(answer.to_html())
    assert page.problems == []
    assert len(page.tags("script")) == len(page.tags("style")) == len(page.tags("title")) == 1
    assert "alert" not in page.texts["script"]
    assert [text for _, text in page.shaded] == [visible(text) for text in TRICKY]
    fragment = answer._repr_html_()
    parsed = Parsed(fragment)
    assert parsed.problems == []
    assert {tag for tag, _ in parsed.elements} == {"div", "span"}
    assert "".join(map(visible, TRICKY)) in parsed.texts["span"]
    for html in (answer.to_html(), fragment):
        assert not re.search(r"https?:|@import|\burl\(|\bsrc=|\bhref=", html)


def test_a_model_and_its_weights_are_text_too() -> None:
    score = score_of(["a"], model="<b>tiny</b>\"'</title>")
    assert Parsed(score.to_html()).tags("b") == []
    assert "<b>" not in score._repr_html_()


def test_the_page_has_all_numbers_and_labels() -> None:
    html = score_of(["a", "b\n"]).to_html(measure="kl")
    page = Parsed(html)
    assert page.tags("html") == [{"lang": "en"}]
    assert "tiny, 4 drafts, weights w-1" in page.texts["title"]
    options = {option["value"]: option for option in page.tags("option")}
    assert tuple(options) == MEASURES
    assert "selected" in options["kl"]
    (label,) = page.tags("label")
    assert page.tags("select") == [{"id": label["for"]}]
    assert {"role": "tooltip", "id": "tip", "hidden": None} in page.tags("div")
    assert "newline" in page.shaded[1][0]
    # One token is in the tab order; arrow keys reach the others.
    assert [span["tabindex"] for span in page.tags("span") if "tabindex" in span] == ["0", "-1"]
    for number in ("0.2000", "0.0500", "0.1500", "-0.4000", "0.2500", "-1.0000"):
        assert f"<td>{number}</td>" in html
    assert "prefers-color-scheme" in html
    assert "width=device-width" in html
    assert "@media print" in html


def test_characters_split_over_tokens_stay() -> None:
    heatmap = score_of(["a", "", "", "🎉", ""], [0.1, 0.2, 0.9, 0.3, 0.4]).heatmap()
    assert [cell.text for cell in heatmap.cells] == ["a", "🎉", "\ufffd"]
    assert [cell.value("epistemic") for cell in heatmap.cells] == [0.1, 0.9, 0.4]
    assert [text for _, text in Parsed(heatmap.to_html()).shaded] == ["a", "🎉", "\ufffd"]
    assert "(part of a character)" in heatmap.to_html()
    assert "5 tokens" in str(heatmap)


def test_spans_count_characters() -> None:
    span = {"start": 2, "end": 4, "text": "🎉c", "epistemic_mean": 1.0, "epistemic_max": 1.0}
    score = score_of(["ab", "", "🎉", "cd", "e"], spans=[span])
    assert score.heatmap().in_span() == [False, True, True, False]
    assert chat_of(score).heatmap().in_span() == [False, True, True, False]
    assert ["doubtful" in classes for classes, _ in Parsed(score.to_html()).shaded] == [
        False,
        True,
        True,
        False,
    ]
    assert "text-decoration:underline" in score._repr_html_()


def test_in_words_without_a_terminal_and_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    heatmap = score_of(["Tok", "yo"]).heatmap()
    assert str(heatmap).startswith("Tokyo\n")
    assert "'yo' 0.20, 'Tok' 0.10" in str(heatmap)
    assert "epistemic mean 0.250" in str(heatmap)
    assert repr(heatmap) == "<HeatMap of 2 tokens by epistemic, top 0.200 nats>"

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "48;2;128;0;38" in str(heatmap)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "\x1b" not in str(heatmap)


def test_no_character_commands_a_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\rhidden"
    assert visible(hostile) == "␛]0;owned␇␛[2J\ufffd31m␡␍hidden"
    score = score_of([hostile, "ok"])
    for text in (str(score.heatmap()), shown(score.heatmap(), color_system=None)):
        assert not set(text) & set("\x1b\x07\x9b\x7f\r")
    assert "\x1b" not in score.to_html() + score._repr_html_()
    assert visible("a\r\n\tb") == "a\n\tb"


def test_an_answer_without_tokens_or_uncertainty() -> None:
    empty = HeatMap([], spans=[], sequence={"n_tokens": 0}, source="tiny")
    assert Parsed(empty.to_html()).problems == []
    assert "0 tokens" in str(empty)
    assert shown(empty)
    bare = {"index": 0, "message": {"content": "hi"}}
    answer = ChatCompletion.model_validate(
        {"id": "1", "created": 1, "model": "m", "choices": [bare]}
    )
    assert answer._repr_html_() is None
    with pytest.raises(DemurError, match="uncertainty=True"):
        answer.to_html()


def test_surprisal_is_minus_logprob() -> None:
    assert HeatToken("a", -1.5, None, {}).value("surprisal") == 1.5
