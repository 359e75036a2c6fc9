"""A heat map as a page of HTML that needs nothing but itself; its style and script lie beside."""

from __future__ import annotations

from importlib import resources

from demur._markup import number, safe
from demur._measures import DISTRIBUTION_MEASURES, MEANINGS, MEASURES
from demur._shades import DARK, LIGHT, N_SHADES, shade_of
from demur.heatmap import Cell, HeatMap

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Uncertainty, token by token: {source}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>Uncertainty, token by token</h1>
<p>{source}</p>
<p class="chosen"><label for="measure">Shaded by</label>
<select id="measure">{options}</select></p>
<p id="legend"><span id="legend-name">{measure}</span>, nats: {legend}
<span class="key doubtful">doubtful stretch</span></p>
<div id="text" lang="" dir="auto" role="group" data-top="{fixed_top}"
aria-label="The response. Arrow keys move from token to token.">{text}</div>
<div id="tip" role="tooltip" hidden></div>
<h2>The whole response</h2>
<p>{n_tokens} tokens; values in nats.</p>
<div class="wide"><table id="sequence">
<thead><tr><th scope="col">measure</th><th scope="col">mean</th><th scope="col">greatest</th>\
<th scope="col">sum</th><th scope="col" class="words">what it says</th></tr></thead>
<tbody>{statistics}</tbody>
</table></div>
<details>
<summary>Every token in numbers</summary>
<div class="wide"><table id="tokens">
<thead><tr><th scope="col">token</th>{heads}<th scope="col">logprob</th><th scope="col">rank</th>\
</tr></thead>
<tbody>{rows}</tbody>
</table></div>
</details>
</main>
<script>
{script}</script>
</body>
</html>
"""


def page(heatmap: HeatMap) -> str:
    """The page. Its script takes the numbers from the table of tokens."""
    return _PAGE.format(
        source=safe(heatmap.source),
        style=_shade_rules() + _beside("_page.css"),
        script=_beside("_page.js"),
        options="".join(_option(name, heatmap.measure) for name in MEASURES),
        measure=heatmap.measure,
        legend=_legend(heatmap),
        fixed_top="" if heatmap.fixed_top is None else repr(float(heatmap.fixed_top)),
        text=_text(heatmap),
        n_tokens=len(heatmap.tokens),
        statistics="".join(
            _statistics(heatmap, name) for name in (*DISTRIBUTION_MEASURES, "logprob")
        ),
        heads="".join(f'<th scope="col">{name}</th>' for name in DISTRIBUTION_MEASURES),
        rows="".join(_rows(index, cell) for index, cell in enumerate(heatmap.cells)),
    )


def _text(heatmap: HeatMap) -> str:
    """The response. One token takes part in the tab order; the script moves which."""
    spans: list[str] = []
    for cell, marked in zip(heatmap.cells, heatmap.in_span(), strict=True):
        shade = shade_of(cell.value(heatmap.measure), heatmap.top)
        classes = f"t s{shade}" + " doubtful" * marked + " newline" * ("\n" in cell.text)
        index = -1 if spans else 0
        spans.append(f'<span class="{classes}" tabindex="{index}">{safe(cell.text)}</span>')
    return "".join(spans)


def _legend(heatmap: HeatMap) -> str:
    return "".join(
        f'<span class="key s{level}">{number(heatmap.top * level / N_SHADES)}</span>'
        for level in range(N_SHADES)
    )


def _option(name: str, chosen: str) -> str:
    label = "surprisal (−logprob)" if name == "surprisal" else name
    selected = " selected" if name == chosen else ""
    return f'<option value="{name}"{selected}>{label}</option>'


def _statistics(heatmap: HeatMap, name: str) -> str:
    """A measure's row. The low end of log-probabilities is their doubtful one."""
    extreme = "min" if name == "logprob" else "max"
    values = (heatmap.sequence.get(f"{name}_{kind}") for kind in ("mean", extreme, "sum"))
    cells = "".join(f"<td>{'' if value is None else number(value)}</td>" for value in values)
    says = "of the tokens, by the target (here the least)"
    meaning = next((text for measure, text in MEANINGS.items() if measure == name), says)
    return f'<tr><th scope="row">{name}</th>{cells}<td class="words">{meaning}</td></tr>'


def _rows(index: int, cell: Cell) -> str:
    """The rows of a cell's tokens; `data-cell` ties them to what is shaded."""
    rows = ""
    for token in cell.tokens:
        text = safe(token.text).replace("\n", "↵").replace("\t", "⇥") or "(part of a character)"
        values = [number(token.value(name)) for name in DISTRIBUTION_MEASURES]
        values += [number(token.logprob), "" if token.rank is None else str(token.rank)]
        numbers = "".join(f"<td>{value}</td>" for value in values)
        rows += f'<tr data-cell="{index}"><th scope="row"><bdi>{text}</bdi></th>{numbers}</tr>\n'
    return rows


def _shade_rules() -> str:
    """The shades' colours: `.s0` to the last, and the other scale for dark pages."""
    light, dark = (
        "".join(
            f".s{level}{{background:{background};color:{foreground}}}\n"
            for level, (background, foreground) in enumerate(shades)
        )
        for shades in (LIGHT, DARK)
    )
    return f"{light}@media screen and (prefers-color-scheme:dark){{\n{dark}}}\n"


def _beside(name: str) -> str:
    return resources.files("demur").joinpath(name).read_text(encoding="utf-8")
