"""Pictures of the report as inline SVG: a study's figure, and a claim's effect with its interval."""

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from etude.lab.results import Results
from etude.lab.rules import Finding
from etude.lab.wording import effect

__all__ = ["figure_svg", "interval_svg"]

WIDTH, HEIGHT, EDGE = 200, 22, 8
PIXELS_AN_INCH = 96
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
DRAWN = {"svg", "g", "defs", "path", "use", "text", "tspan", "image", "clipPath", "rect", "circle", "marker"} | {
    "linearGradient", "radialGradient", "stop", "filter", "pattern", "mask", "polygon", "polyline", "line", "ellipse",
}  # fmt: skip
HOUSE_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}

ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


def figure_svg(draw: Callable[[Results], Figure], results: Results, name: str, title: str) -> str:
    """A study's figure as SVG that stands alone: same bytes for same data, ids that clash with no other's.

    Only what draws is kept: no links, scripts or style sheets. Text stays text.
    """
    with mpl.rc_context(HOUSE_STYLE):
        figure = draw(results)
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _clean(root, name)
    # At its own size where there is room, and never so small that its text cannot be read.
    width = figure.get_figwidth() * PIXELS_AN_INCH
    root.set("style", f"width: {1.15 * width:.0f}px; min-width: {0.7 * width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", f"{title}. {_described(figure)}".strip())
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, name: str) -> None:
    """Drop what does not draw, and make ids and the references to them the study's own."""
    for child in list(element):
        if child.tag.removeprefix(f"{{{SVG}}}") in DRAWN:
            _clean(child, name)
        else:
            element.remove(child)
    for attribute, value in list(element.items()):
        if attribute.lower().startswith("on"):
            del element.attrib[attribute]
        elif attribute == "id":
            element.set(attribute, f"{name}-{value}")
        elif attribute in ("href", f"{{{XLINK}}}href"):
            if value.startswith("#"):
                element.set(attribute, f"#{name}-{value[1:]}")
            elif not value.startswith("data:image/"):
                del element.attrib[attribute]
        else:
            element.set(attribute, value.replace("url(#", f"url(#{name}-"))


def _described(figure: Figure) -> str:
    """What is drawn against what, for those who do not see it."""
    panels = [
        f"{axes.get_title() + ': ' if axes.get_title() else ''}{axes.get_ylabel()} against {axes.get_xlabel()}"
        for axes in figure.axes
        if axes.get_xlabel() and axes.get_ylabel()
    ]
    return "; ".join(panels)


def interval_svg(finding: Finding) -> str:
    """The effect as a dot, its interval as a line, and what it is held against as ticks."""
    found = finding.effect
    known = [value for value in (found.low, found.mean, found.high, *finding.limits) if math.isfinite(value)]
    if not math.isfinite(found.mean):
        return ""
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    def place(value: float) -> str:
        inside = min(max(value, low), high)
        return f"{EDGE + (inside - low) / span * (WIDTH - 2 * EDGE):.1f}"

    middle = HEIGHT // 2
    ticks = "".join(
        f'<line class="bound" x1="{place(limit)}" x2="{place(limit)}" y1="2" y2="{HEIGHT - 2}"/>'
        for limit in finding.limits
    )
    label = escape(re.sub(r"\s+", " ", f"effect {effect(finding)}, held against: {finding.bound}"), quote=True)
    return (
        f'<svg class="interval" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">{ticks}'
        f'<line class="range" x1="{place(found.low)}" x2="{place(found.high)}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="effect" cx="{place(found.mean)}" cy="{middle}" r="4.5"/></svg>'
    )
