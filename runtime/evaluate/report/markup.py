"""HTML and SVG that are safe by construction: whatever is not markup already is escaped."""

from __future__ import annotations

import html
import unicodedata

__all__ = ["Markup", "clean", "join", "tag"]

_VOID = ("br", "meta")
_HIDDEN = ("Cc", "Cs", "Cf", "Co", "Zl", "Zp")
"""Unicode categories of what cannot be seen, or turns the text around it."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def clean(text: object) -> str:
    """Returns text without control characters, which are shown as �: a name must not hide or turn what follows it."""
    return "".join("�" if unicodedata.category(sign) in _HIDDEN else sign for sign in str(text))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """Returns an element.

    Args:
        name: of the element.
        content: Markup as it is, anything else as escaped text; None is left out.
        attributes: `class_` is `class`, `stroke_width` is `stroke-width`; None and False are left out, True is "".
    """
    opening = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            text = "" if value is True else _number(value)
            opening.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(clean(text))}"')
    start = f"<{' '.join(opening)}>"
    return Markup(start if name in _VOID else f"{start}{join(*content)}</{name}>")


def join(*content: object) -> Markup:
    """Returns contents one after the other, escaped where they are no Markup."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(clean(part)) for part in content if part is not None)
    )


def _number(value: object) -> str:
    """Coordinates to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
