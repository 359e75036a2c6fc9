"""The shades of a heat map: light to dark on paper, dark to light on a dark page.

Each is one ramp of lightness, which the colour-blind read as well, and has its own colour of text,
with a contrast of at least 4.5 : 1 (WCAG AA).
"""

from __future__ import annotations

# (background, text), from the lowest values to the highest. ColorBrewer's YlOrRd.
LIGHT = (
    ("#ffffcc", "#000000"),
    ("#fed976", "#000000"),
    ("#feb24c", "#000000"),
    ("#fd8d3c", "#000000"),
    ("#e31a1c", "#ffffff"),
    ("#800026", "#ffffff"),
)

DARK = (
    ("#1f1a17", "#f2f2f2"),
    ("#471d12", "#ffffff"),
    ("#74290f", "#ffffff"),
    ("#a8420e", "#ffffff"),
    ("#f08a24", "#000000"),
    ("#ffe0a3", "#000000"),
)

N_SHADES = len(LIGHT)


def shade_of(value: float, top: float) -> int:
    """The shade of a value; the darkest holds a sixth of [0, top], and all above."""
    if top <= 0:
        return 0
    return max(0, min(int(value / top * N_SHADES), N_SHADES - 1))
