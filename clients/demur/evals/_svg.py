"""A figure of matplotlib as a piece of a page: its text stays text, its colours are the page's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from demur.evals._families import FAMILIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that a page defines as --ink, --grid, ..., and what stands for them while matplotlib
# draws: it knows no colours that change with the page.
_NAMES = ("ink", "grid", *FAMILIES)
PAINTS = {name: f"#0101{number:02x}" for number, name in enumerate(_NAMES)}
_PAINT = re.compile("#0101([0-9a-f]{2})")

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "demur",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "grid.color": PAINTS["grid"],
    "axes.edgecolor": PAINTS["ink"],
    "axes.labelcolor": PAINTS["ink"],
    "xtick.color": PAINTS["ink"],
    "ytick.color": PAINTS["ink"],
    "text.color": PAINTS["ink"],
}


def drawn(name: str, says: str, draw: Callable[[], Figure]) -> Markup:
    """What `draw` draws, as an element for a page.

    Args:
        name: unique in the page; its ids begin with it.
        says: the same in words, for those who do not see it.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # It measures texts in a font of its own; the browser's have the characters that lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        out = StringIO()
        draw().savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    root = ElementTree.fromstring(text[text.index("<svg") :])
    for element in root.iter():
        _adapt(element, name)
    for group in list(root):
        # matplotlib's name and date; and a style sheet that would hold for the whole page.
        if group.tag == "metadata" or group.find("style") is not None:
            root.remove(group)
    for size in ("width", "height"):  # the page's style has them
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-label", says)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt(element: ElementTree.Element, name: str) -> None:
    """No namespaces, ids of its own, the page's colours and font."""
    element.tag = _local(element.tag)
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id":
            value = f"{name}-{value}"
        elif _local(key) == "href":
            value = value.replace("#", f"#{name}-")
        else:
            value = value.replace("url(#", f"url(#{name}-")
            value = _PAINT.sub(lambda found: f"var(--{_NAMES[int(found[1], 16)]})", value)
            value = re.sub(r"(font: [\d.]+px) [^;]+", r"\1 var(--font)", value)
        element.set(_local(key), value)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
