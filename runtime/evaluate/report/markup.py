"""HTML and SVG elements with escaped content, and the style sheet of the page.

The page has a light and a dark theme, and fits phones and paper.
"""

from __future__ import annotations

import html
import unicodedata

from runtime.system.colors import DARK, LEVELS, LIGHT, heat

__all__ = ["Markup", "clean", "join", "style_sheet", "tag"]

_VOID = ("br", "meta")
_HIDDEN = ("Cc", "Cs", "Cf", "Co", "Zl", "Zp")
"""Unicode categories of invisible characters, some of which change the direction of text."""


class Markup(str):
    """Text that is already escaped markup."""

    __slots__ = ()


def clean(text: object) -> str:
    """Replace invisible characters, which could hide or reorder text, with �."""
    return "".join("�" if unicodedata.category(sign) in _HIDDEN else sign for sign in str(text))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: name of the element.
        content: Markup is inserted unchanged, None is skipped, anything else is escaped.
        attributes: `class_` becomes `class`, `stroke_width` becomes `stroke-width`; None and False
            are skipped, True becomes "".
    """
    opening = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            text = "" if value is True else _attribute_text(value)
            opening.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(clean(text))}"')
    start = f"<{' '.join(opening)}>"
    return Markup(start if name in _VOID else f"{start}{join(*content)}</{name}>")


def join(*content: object) -> Markup:
    """Return contents one after another. Everything except Markup is escaped; None is skipped."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(clean(part)) for part in content if part is not None)
    )


def _attribute_text(value: object) -> str:
    """Return an attribute's value as text; coordinates are rounded to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header.top,footer{max-width:1120px;margin:0 auto;padding:0 16px}
header.top{padding-top:28px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.3rem;line-height:1.25;margin:2.8rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.8rem 0 .4rem}
h4{font-size:.95rem;margin:0 0 .4rem}
p{margin:.4rem 0 .8rem;max-width:75ch}
.quiet,small,figcaption,dt{color:var(--quiet)}
.lead{font-size:1.02rem;color:var(--quiet)}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:3px solid var(--link);outline-offset:2px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.8rem 0 0;font-size:.92rem}
code{font:.86em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
bdi{overflow-wrap:anywhere}
.findings{padding-left:1.1rem;margin:.6rem 0 1.2rem}
.findings li{margin:.45rem 0}
.worse{color:var(--bad);font-weight:650}
.better{color:var(--good);font-weight:650}
.same{color:var(--quiet)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;color:var(--quiet);font-size:.88rem;padding-bottom:.4rem}
th,td{padding:.4rem .65rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child,.headline :is(th,td):nth-child(2){text-align:left}
thead th{vertical-align:bottom;font-weight:650}
thead small,td small{display:block;font-weight:400;font-size:.8rem;line-height:1.35;white-space:nowrap}
thead small{white-space:normal}
tbody th{font-weight:600}
.headline{width:100%}
.headline tbody th{min-width:8.6rem}
.headline .value{font-size:1.06rem;font-weight:600}
.chip{display:inline-block;padding:0 .45rem;border:1px solid var(--rule);border-radius:.6rem;background:var(--card);
font-size:.78rem;font-weight:500;white-space:nowrap}
.verdict{background:var(--card);border:1px solid var(--rule);border-left:4px solid var(--link);
border-radius:8px;
padding:.6rem 1rem;margin:1rem 0;font-size:1.06rem}
.verdict p{margin:.1rem 0 .3rem}
.verdict ul{margin:.2rem 0;padding-left:1.1rem}
.verdict li{margin:.3rem 0}
.meaning{font-size:.9rem;padding-left:1.1rem;max-width:85ch}
.key{display:flex;align-items:center;gap:.5rem;font-size:.86rem}
.ramp{display:flex;border:1px solid var(--rule)}
.ramp span{width:10px;height:14px}
.downloads{font-size:.92rem}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:0;margin:.5rem 0 .6rem;font-size:.92rem}
.legend li{display:flex;align-items:center;gap:.4rem;min-width:0}
.swatch{width:28px;height:16px;flex:none}
.panels{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr))}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:8px}
figure{margin:0;min-width:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:10px 12px}
.small figure{padding:6px 6px 2px}
.small .wide{grid-column:span 2;grid-row:span 2;padding:8px 10px}
figure svg{display:block;width:100%;max-width:430px;height:auto;margin:0 auto}
figcaption{font-size:.86rem;margin-bottom:.25rem}
figcaption strong{color:var(--ink);font-weight:600}
.small figcaption{margin:0 0 0 4px;font-size:.82rem}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--quiet)}
svg .label{fill:var(--ink);font-size:12px}
svg .number{fill:var(--ink);font-size:10.5px}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--quiet);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:2}
.mark,.bar{fill:var(--c)}
.mark{stroke:var(--card);stroke-width:.8}
.whisker{fill:none;stroke:var(--ink);stroke-width:1.3}
.front{fill:none;stroke:var(--quiet);stroke-width:1.5;stroke-dasharray:5 4}
.ideal{fill:none;stroke:var(--ink);stroke-width:1.2;stroke-dasharray:4 3}
.control{--c:var(--quiet)}
.gap{fill:none;stroke:var(--ink);stroke-width:1;stroke-dasharray:2 1.5}
.share{fill:var(--quiet)}
.heat{width:100%;font-size:.82rem;table-layout:fixed}
.heat th,.heat td{padding:.16rem .2rem;border:1px solid var(--page);text-align:center;
vertical-align:middle;line-height:1.15}
.heat.tall td{height:2.65em}
.heat th{font-weight:500}
.heat tbody th,.heat thead th:first-child{text-align:left;width:8.4rem;overflow-wrap:anywhere}
.heat td small{color:inherit;font-size:.72rem;display:block}
.heat tr.mean th,.heat tr.mean td{border-top:2px solid var(--quiet);font-weight:650}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--link);font-size:.92rem;padding:.25rem 0}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.15rem .9rem;margin:.3rem 0;font-size:.88rem}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
.cards{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.card{border:1px solid var(--rule);background:var(--card);border-radius:8px;padding:12px 14px;min-width:0}
footer{margin-top:3rem;padding-top:1rem;padding-bottom:2rem;font-size:.86rem;color:var(--quiet)}
@media (max-width:760px){
h1{font-size:1.45rem}
.headline,.headline caption,.headline tbody,.headline tr,.headline td,.headline th{display:block}
.headline thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.headline tr{border:1px solid var(--rule);border-radius:8px;background:var(--card);padding:.5rem .8rem;margin:.7rem 0}
.headline th,.headline td{border:0;text-align:left;padding:.18rem 0}
.headline tbody th{font-size:1.05rem;padding-bottom:.3rem}
.headline td{display:grid;grid-template-columns:minmax(7.4rem,38%) 1fr;gap:.6rem}
.headline td::before{content:attr(data-label);color:var(--quiet);font-size:.86rem;line-height:1.35}
.headline td.nothing{display:none}
.headline td small{white-space:normal}
.headline .scroll{overflow:visible}
.small{grid-template-columns:repeat(2,minmax(0,1fr))}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.35rem}
}
@media print{body{font-size:11pt}figure,.card,tr{break-inside:avoid}nav,.downloads{display:none}}
"""


def style_sheet() -> str:
    """Return the style sheet."""
    dark = "@media (prefers-color-scheme:dark){" + _variables(DARK) + "}"
    models = "".join(f".s{place}{{--c:var(--s{place})}}" for place in range(6))
    steps = "".join(f".h{level}{{background:var(--h{level})}}" for level in range(LEVELS))
    return f":root{{color-scheme:light dark}}{_variables(LIGHT)}{dark}{models}{steps}{_RULES}"


def _variables(palette: dict[str, str]) -> str:
    colors = palette | {f"h{level}": heat(palette, level) for level in range(LEVELS)}
    return ":root{" + "".join(f"--{name}:{color};" for name, color in colors.items()) + "}"
