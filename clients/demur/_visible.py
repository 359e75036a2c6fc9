"""A model's text, safe to show: no character in it can command a terminal."""

from __future__ import annotations

# ESC, BEL and the like as their pictures (U+241B), C1 codes as the replacement character. Line
# feeds and tabs stay: they are layout.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """The text with its control characters made visible; line ends become line feeds."""
    return text.replace("\r\n", "\n").translate(_PICTURES)
