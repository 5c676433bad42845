"""Text from outside: what guests, files and tools wrote, made safe for a person's terminal.

Names of a program (its own, its files', its symbols') come through here when they are read, so
that nobody has to think of it later. What a guest says is data, and kept as it is; it comes through
here where it is printed: in sentences, errors, tables and by commands.
"""

from __future__ import annotations

__all__ = ["THIN", "plain", "printable"]

THIN = "\N{THIN SPACE}"
KEPT = "\n\t"  # what text of several lines may have
NAMED_CONTROLS = {9: "\\t", 10: "\\n", 13: "\\r"}


def plain(what: object, limit: int = 200) -> str:
    """Text from anywhere as one safe line, cut at limit characters.

    Controls, direction marks and half surrogates are spelled out.
    """
    string = str(what)
    if len(string) > limit:
        string = string[: limit - 1] + "…"
    if string.isprintable():
        return string
    return _spelled(string, THIN)


def printable(text: str) -> str:
    """Text of any length whose lines and tabs stay; all else is spelled out as by `plain`."""
    if text.isprintable():
        return text
    return _spelled(text, THIN + KEPT)


def _spelled(text: str, kept: str) -> str:
    return "".join(c if c.isprintable() or c in kept else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    """A character that cannot be printed, as C writes it."""
    if code in NAMED_CONTROLS:
        return NAMED_CONTROLS[code]
    if code < 256:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
