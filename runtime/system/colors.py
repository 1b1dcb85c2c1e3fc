"""The color palettes of reports and plots, and the contrast between two colors."""

from __future__ import annotations

__all__ = ["DARK", "LEVELS", "LIGHT", "contrast", "heat", "level_of"]

LEVELS = 21
"""Color steps of a heat map, from an error of 0 to an error of 1."""

LIGHT = {
    "page": "#ffffff",
    "card": "#f6f7f9",
    "ink": "#16191d",
    "quiet": "#565e68",
    "rule": "#d9dde3",
    "link": "#0b57b8",
    "good": "#0a6b3d",
    "bad": "#b3261e",
    "cold": "#ffffff",
    "hot": "#f07f45",
    "s0": "#0b62c4",
    "s1": "#c2410c",
    "s2": "#0f766e",
    "s3": "#7c3aed",
    "s4": "#946200",
    "s5": "#be185d",
}
DARK = {
    "page": "#12151a",
    "card": "#1a1f26",
    "ink": "#eceff3",
    "quiet": "#a4adb9",
    "rule": "#353c47",
    "link": "#7db8ff",
    "good": "#5fd39a",
    "bad": "#ff8a80",
    "cold": "#12151a",
    "hot": "#a4400f",
    "s0": "#6cb2ff",
    "s1": "#ff9a5c",
    "s2": "#4fd1c1",
    "s3": "#b794ff",
    "s4": "#e3b341",
    "s5": "#ff8fc0",
}


def level_of(share: float) -> int:
    """Return the heat map step of `share`, which is clipped to [0, 1]."""
    return round(min(max(share, 0.0), 1.0) * (LEVELS - 1))


def heat(palette: dict[str, str], level: int) -> str:
    """Return the heat map color of a step, as `#rrggbb`."""
    cold, hot = _rgb(palette["cold"]), _rgb(palette["hot"])
    part = level / (LEVELS - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(cold, hot, strict=True))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colors, 1 to 21. Small text needs 4.5. Source: WCAG 2.2."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    parts = [value / 255 for value in _rgb(color)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
