"""Draw docs/images/overview-light.svg and overview-dark.svg: the two BatchNorms, and the pipeline.

python scripts/draw_overview.py
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent.parent / "docs" / "images"
THEMES = {
    "light": {
        "ink": "#1f2933",
        "quiet": "#52606d",
        "line": "#7b8794",
        "box": "#f5f7fa",
        "edge": "#cbd2d9",
        "main": "#0b69a3",
        "aux": "#b44d12",
        "main_fill": "#dceefb",
        "aux_fill": "#fff0e0",
    },
    "dark": {
        "ink": "#e4e7eb",
        "quiet": "#9aa5b1",
        "line": "#7b8794",
        "box": "#222b36",
        "edge": "#3e4c59",
        "main": "#62b0e8",
        "aux": "#f0a35e",
        "main_fill": "#123a56",
        "aux_fill": "#4d2a12",
    },
}
FONT = "font-family='-apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


class Drawing:
    """SVG elements of one theme."""

    def __init__(self, colors: dict[str, str]) -> None:
        self.colors = colors
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, size: int = 14, color: str = "ink", **style: str) -> None:
        extra = "".join(f" {name.replace('_', '-')}='{value}'" for name, value in style.items())
        fill = self.colors[color]
        self.parts.append(
            f"<text x='{x}' y='{y}' font-size='{size}' fill='{fill}' text-anchor='middle' {FONT}{extra}>"
            f"{escape(text)}</text>"
        )

    def box(
        self, x: float, y: float, w: float, h: float, lines: list[str], fill: str = "box", edge: str = "edge"
    ) -> None:
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='8' fill='{self.colors[fill]}' "
            f"stroke='{self.colors[edge]}' stroke-width='1.5'/>"
        )
        first = y + h / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            bold = {"font_weight": "600"} if number == 0 else {}
            self.text(
                x + w / 2,
                first + 18 * number,
                line,
                14 if number == 0 else 12,
                "ink" if number == 0 else "quiet",
                **bold,
            )

    def arrow(self, *points: tuple[float, float], color: str = "line", dashed: bool = False) -> None:
        path = " L ".join(f"{x} {y}" for x, y in points)
        dash = " stroke-dasharray='5 4'" if dashed else ""
        self.parts.append(
            f"<path d='M {path}' fill='none' stroke='{self.colors[color]}' stroke-width='2'{dash} "
            f"marker-end='url(#{color})'/>"
        )

    def svg(self, width: int, height: int, title: str) -> str:
        markers = "".join(
            f"<marker id='{name}' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
            f"<path d='M 0 0 L 10 5 L 0 10 z' fill='{self.colors[name]}'/></marker>"
            for name in ("line", "main", "aux")
        )
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'>"
            f"<title>{escape(title)}</title><defs>{markers}</defs>{''.join(self.parts)}</svg>\n"
        )


def overview(colors: dict[str, str]) -> str:
    d = Drawing(colors)
    d.text(470, 26, "Training: one network, two sets of BatchNorms", 16, font_weight="600")
    d.box(20, 60, 150, 56, ["clean images"], "main_fill", "main")
    d.box(20, 176, 150, 56, ["adversarial images", "PGD, up to ±ε"], "aux_fill", "aux")
    d.arrow((95, 116), (95, 172), color="aux", dashed=True)
    d.text(138, 150, "attack", 12, "quiet")
    d.box(230, 118, 130, 56, ["convolution", "shared weights"])
    d.box(430, 60, 150, 56, ["main BatchNorm"], "main_fill", "main")
    d.box(430, 176, 150, 56, ["auxiliary BatchNorm"], "aux_fill", "aux")
    d.box(650, 118, 120, 56, ["next layers", "shared weights"])
    d.text(855, 94, "clean loss", 14, "main")
    d.text(855, 211, "adversarial loss", 14, "aux")
    d.text(855, 152, "+", 18, "quiet")
    d.arrow((170, 88), (250, 88), (270, 116), color="main")
    d.arrow((170, 204), (250, 204), (270, 176), color="aux")
    d.arrow((320, 116), (340, 88), (426, 88), color="main")
    d.arrow((320, 176), (340, 204), (426, 204), color="aux")
    d.arrow((580, 88), (660, 88), (680, 116), color="main")
    d.arrow((580, 204), (660, 204), (680, 176), color="aux")
    d.arrow((740, 116), (760, 90), (806, 90), color="main")
    d.arrow((740, 176), (760, 206), (790, 206), color="aux")
    d.text(
        470,
        268,
        "Inference uses the main BatchNorms only. They are folded into the convolutions: no extra cost.",
        13,
        "quiet",
    )

    d.text(340, 320, "Deployment: each step writes a file that the next one verifies", 16, font_weight="600")
    steps = [
        ("train", "checkpoint.pt"),
        ("export", "model.onnx"),
        ("calibrate", "model.int8.onnx"),
        ("build", "model.engine"),
    ]
    for number, (step, file) in enumerate(steps):
        x = 20 + 170 * number
        d.box(x, 348, 130, 56, [step, file])
        if number:
            d.arrow((x - 40, 376), (x - 4, 376))
    for number, (step, what) in enumerate(
        (("predict, serve", "in your process"), ("eval, attack", "robustness"), ("bench", "latency"))
    ):
        y = 306 + 54 * number
        d.box(740, y, 180, 44, [step, what])
        d.arrow((660, 376), (700, 376), (700, y + 22), (736, y + 22))
    return d.svg(
        940,
        470,
        "AdvProp trains with two sets of BatchNorms; the trained network is exported, quantized, built and measured",
    )


def main() -> None:
    for theme, colors in THEMES.items():
        (IMAGES / f"overview-{theme}.svg").write_text(overview(colors))


if __name__ == "__main__":
    main()
