"""The report of an evaluation: report.json for programs, and report.html for people.

The page needs nothing but itself. What it shows is laid out in _report.html and _report.css.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from demur._markup import described
from demur._shades import DARK, LIGHT, N_SHADES, shade_of
from demur._visible import visible
from demur._words import extremes
from demur.evals import _parts, _reading
from demur.evals._families import FAMILIES

_NOTHING = "–"


def write_report(found: dict[str, Any], folder: Path) -> Path:
    """Write `report.json` and `report.html` into a folder, which is made if it is not there.

    Args:
        found: all that was measured. The headline speaks of its first table of the test half.

    Returns:
        The page. A NaN is null in the JSON, which knows none, and – in the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = _each(found, _finite)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    file = folder / "report.html"
    file.write_text(_page(_each(found, _legible)), encoding="utf-8")
    return file


def _page(found: dict[str, Any]) -> str:
    environment = Environment(
        loader=FunctionLoader(_beside),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _NOTHING if value is None else value,
    )
    environment.filters |= {
        "decimals": _decimals,
        "percent": _percent,
        "digits": _digits,
        "whole": _whole,
        "duration": _duration,
        "told_apart": _reading.told_apart,
        "extremes": extremes,
        "described": described,
    }
    return environment.get_template("_report.html").render(
        found,
        style=Markup(_beside("_report.css")),
        shades={"light": LIGHT, "dark": DARK},
        n_shades=N_SHADES,
        shade_of=shade_of,
        families=FAMILIES,
        headline=_reading.headline(found),
        table_parts=list(_parts.tables(found)),
        difference_parts=list(_parts.differences(found)),
        curve_parts=list(_parts.curves(found)),
        reliability=_parts.reliability(found),
        cost_parts=list(_parts.costs(found)),
        heat_maps=_reading.heat_maps(found["examples"]),
    )


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same with each leaf and each key changed."""
    if isinstance(value, dict):
        return {change(key): _each(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each(item, change) for item in value]
    return change(value)


def _finite(leaf: Any) -> Any:
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


def _legible(leaf: Any) -> Any:
    """Control characters as pictures; half of a surrogate pair, which no file holds, as `?`."""
    return visible(leaf.encode(errors="replace").decode()) if isinstance(leaf, str) else leaf


def _decimals(value: float | None, digits: int = 3) -> str:
    """A minus that is one, and none before what rounds to zero."""
    if value is None:
        return _NOTHING
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return _NOTHING if value is None else f"{100 * value:.1f}%"


def _digits(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3g}"


def _whole(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _beside(name: str) -> str:
    return resources.files("demur.evals").joinpath(name).read_text(encoding="utf-8")
